"""The balanced batches of a rank as lists of row numbers, for any DataLoader, data set and collator."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

from .balancing import Cost, plan_micro_batches, token_cost
from .sampler import GlobalBatchSampler


class BalancedBatchSampler(Sampler[list[int]]):
    """Yields, for one rank, `micro_batches` lists of rows per global batch: `DataLoader(..., batch_sampler=this)`.

    lengths: int [rows], tokens of each row as the collator will give them.  global_batch_size: rows of a step over all
    ranks.  cost, max_tokens_per_device: as for StepLoader.  micro_batches: per rank and step, to be told to the trainer
    as its gradient accumulation.  A list is empty where a rank has nothing to do; the last, smaller batch of an epoch
    is left out unless `drop_last` is False.

    The rows are already those of this rank: a framework must not divide them again. With transformers' Trainer return
    the loader from an overridden `get_train_dataloader`, with Accelerate leave it out of `prepare()`. Such trainers
    average over micro-batches of different sizes: pass the loss the tokens of the whole step (`num_items_in_batch`).

        loader = DataLoader(rows, batch_sampler=BalancedBatchSampler(lengths, 256, world_size=8, rank=rank))
    """

    def __init__(
        self,
        lengths: ArrayLike,
        global_batch_size: int,
        *,
        world_size: int = 1,
        rank: int = 0,
        cost: Cost | None = None,
        max_tokens_per_device: int | None = None,
        micro_batches: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size} ranks")
        self.world_size, self.rank, self.cost = world_size, rank, cost or token_cost
        self.max_tokens, self.micro_batches = max_tokens_per_device, micro_batches
        self.sampler = GlobalBatchSampler(
            len(self.lengths), global_batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last
        )
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration serves; trainers call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Lists of an epoch, the same on every rank."""
        return len(self.sampler) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for epoch, cursor in self.sampler.positions(self.epoch):
            rows = self.sampler.batch_at(epoch, cursor)
            tokens = self.lengths[rows]
            plan = plan_micro_batches(self.cost(tokens), tokens, self.world_size, self.max_tokens, self.micro_batches)
            for number in range(self.micro_batches):
                yield rows[plan.members(number, self.rank)].tolist()
