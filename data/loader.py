"""Global steps of one rank: sampler -> balanced plan -> jagged micro-batches, in worker processes if asked."""

import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from .balancing import Cost, plan_micro_batches, token_cost
from .collator import CompactBatch, EvalCollator, GenRecCollator, GlobalStep, MicroBatch
from .dataset import EventDataset
from .sampler import GlobalBatchSampler
from .transport import Arrays, BlockRing, Parcel, Receiver
from .windows import EveryTarget, Samples


@dataclass
class _CompactStep:
    """A step as a worker sends it: numbers, and the arrays of its micro-batches in shared memory."""

    step: GlobalStep
    parcel: Parcel
    num_micro_batches: int


class _Steps(Dataset[_CompactStep]):
    """Position (epoch, cursor) -> step of one rank: a pure function, so that any worker may build it."""

    def __init__(
        self,
        sampler: GlobalBatchSampler,
        collator: GenRecCollator,
        world_size: int,
        rank: int,
        cost: Cost,
        max_tokens: int | None,
        micro_batches: int | None,
    ) -> None:
        self.sampler, self.collator, self.cost = sampler, collator, cost
        self.world_size, self.rank = world_size, rank
        self.max_tokens, self.micro_batches = max_tokens, micro_batches
        self.ring = BlockRing(1)

    def __getitem__(self, position: tuple[int, int]) -> _CompactStep:
        step, batches = self._compact(*position)
        arrays = {name: values for k, batch in enumerate(batches) for name, values in _flat(k, batch)}
        return _CompactStep(step, self.ring.pack(arrays), len(batches))

    def build(self, epoch: int, cursor: int, pin_memory: bool = False) -> GlobalStep:
        """The step at a position, computed in this process."""
        step, batches = self._compact(epoch, cursor)
        return self._expanded(step, batches, pin_memory)

    def receive(self, sent: _CompactStep, receiver: Receiver, pin_memory: bool) -> GlobalStep:
        """The step that a worker sent."""
        arrays = receiver.unpack(sent.parcel)
        return self._expanded(
            sent.step, _nested(arrays, sent.num_micro_batches, self.collator.samples_type), pin_memory
        )

    def _expanded(self, step: GlobalStep, batches: list[CompactBatch], pin_memory: bool) -> GlobalStep:
        expanded = [self.collator.expand(batch, step.step, pin_memory) for batch in batches]
        return replace(step, micro_batches=expanded)

    def _compact(self, epoch: int, cursor: int) -> tuple[GlobalStep, list[CompactBatch]]:
        step = self.sampler.step_at(epoch, cursor)
        indices = self.sampler.batch_at(epoch, cursor)
        samples = self.collator.samples(indices, epoch)
        tokens = samples.num_inputs
        plan = plan_micro_batches(self.cost(tokens), tokens, self.world_size, self.max_tokens, self.micro_batches)
        shared = self.collator.draw_shared(samples, step)
        batches = [
            self.collator.compact(samples[plan.members(number, self.rank)], step, shared)
            for number in range(plan.num_micro_batches)
        ]
        about = GlobalStep(
            step=step,
            epoch=epoch,
            cursor=cursor,
            micro_batches=[],
            num_items_in_batch=self.collator.num_items(samples),
            num_users=len(indices),
            num_tokens=int(tokens.sum()),
            end=self.sampler.next_position(epoch, cursor),
        )
        return about, batches


_PARTS = ("samples", "values", "drawn")


def _flat(number: int, batch: CompactBatch) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays of the `number`-th micro-batch as "number/part/name"."""
    for part, arrays in zip(_PARTS, (vars(batch.samples), batch.values, batch.drawn), strict=True):
        for name, values in arrays.items():
            yield f"{number}/{part}/{name}", values


def _nested(arrays: Arrays, num_micro_batches: int, samples_type: type[Samples]) -> list[CompactBatch]:
    """The micro-batches of arrays that `_flat` has named."""
    parts: list[dict[str, Arrays]] = [{part: {} for part in _PARTS} for _ in range(num_micro_batches)]
    for key, values in arrays.items():
        number, part, name = key.split("/", 2)
        parts[int(number)][part][name] = values
    return [CompactBatch(samples_type(**part["samples"]), part["values"], part["drawn"]) for part in parts]


def _as_is(step: Any) -> Any:
    return step


def _outlive_sigterm(_: int) -> None:
    """A scheduler tells a whole job to end; the training process still needs its batches to come to a stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StepLoader:
    """Iterates the GlobalSteps of one rank from a position to the end of its epoch; iterate again for the next epoch.

    dataset, sampler, collator: the split, its order and its micro-batches.  world_size, rank: of the data-parallel
    group. cost: int [n] input lengths -> float [n], the model's cost of samples of these lengths (its `flops`);
    tokens by default. max_tokens_per_device: budget of a micro-batch; the number of micro-batches is the least that
    keeps it, unless fixed by `micro_batches`.  num_workers, pin_memory, prefetch_factor: as in torch's DataLoader;
    they never change a step. start: (epoch, cursor) to continue at; default: the sampler's position.

    Raises ValueError when a sequence exceeds the budget, or the collator reads another dataset.

        for step in StepLoader(dataset, sampler, collator, world_size=2, rank=0, max_tokens_per_device=8192):
            ...  # step.micro_batches, step.num_items_in_batch
    """

    def __init__(
        self,
        dataset: EventDataset,
        sampler: GlobalBatchSampler,
        collator: GenRecCollator,
        *,
        world_size: int = 1,
        rank: int = 0,
        cost: Cost | None = None,
        max_tokens_per_device: int | None = None,
        micro_batches: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
        start: tuple[int, int] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size} ranks")
        if collator.dataset is not dataset:
            raise ValueError("the collator reads another dataset than the loader; build it with the same one")
        if sampler.num_rows != len(collator.windows):
            raise ValueError(
                f"the sampler orders {sampler.num_rows} rows, the split has {len(collator.windows)} samples; "
                "build it with that number"
            )
        _check_budget(collator, max_tokens_per_device)
        self.sampler = sampler
        self._steps = _Steps(
            sampler, collator, world_size, rank, cost or token_cost, max_tokens_per_device, micro_batches
        )
        self._num_workers, self._prefetch_factor = num_workers, prefetch_factor
        self._pin_memory = pin_memory and torch.cuda.is_available()
        if pin_memory and not self._pin_memory:
            warnings.warn("pin_memory has no effect: there is no CUDA device", stacklevel=2)
        self._position = start if start is not None else (sampler.epoch, sampler.cursor)

    def __len__(self) -> int:
        """Steps from the position to the end of its epoch."""
        return len(self.sampler.positions(*self._position))

    def balance_by(self, cost: Cost) -> None:
        """Divide the following iterations' steps by another cost, the same on every rank; what a step holds stays."""
        self._steps.cost = cost

    def step_at(self, epoch: int, cursor: int) -> GlobalStep:
        """The step at a position, computed here."""
        return self._steps.build(epoch, cursor)

    def __iter__(self) -> Iterator[GlobalStep]:
        positions = self.sampler.positions(*self._position)
        if not self._num_workers:
            yield from self._serve(self._steps.build(*position, self._pin_memory) for position in positions)
            return
        # A worker is asked for prefetch_factor steps; one more of its steps may be in use here.
        self._steps.ring = BlockRing(self._prefetch_factor + 2)
        # A generator of its own: DataLoader otherwise draws a seed from torch's global one, and so moves it.
        loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=positions,
            collate_fn=_as_is,
            worker_init_fn=_outlive_sigterm,
            generator=torch.Generator(),
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor,
        )
        receiver = Receiver()
        yield from self._serve(self._steps.receive(sent, receiver, self._pin_memory) for sent in loader)

    def _serve(self, steps: Iterable[GlobalStep]) -> Iterator[GlobalStep]:
        for step in steps:
            self._position = step.end
            yield step

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step served, as JSON values; independent of world size and workers."""
        epoch, cursor = self._position
        return {**self.sampler.state_dict(), "epoch": epoch, "cursor": cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position; ValueError when it is of another seed or number of rows."""
        self.sampler.load_state_dict(state)
        self._position = (self.sampler.epoch, self.sampler.cursor)


def _check_budget(collator: GenRecCollator, max_tokens: int | None) -> None:
    if max_tokens is None or not len(collator.dataset):
        return
    longest = collator.longest_sample()
    if longest > max_tokens:
        raise ValueError(
            f"max_tokens_per_device={max_tokens} is below the longest sequence of {longest} tokens: raise it "
            "or lower max_length"
        )


class EvalLoader:
    """Iterates micro-batches of an evaluation split on one rank, every target once over all ranks.

    batch_size: users of a batch over all ranks.  max_length: most inputs of a user.  Ranks get the same number of
    micro-batches, some of them possibly empty.  A row whose targets do not fit in one window gives several samples.
    The micro-batches are those of `EvalCollator`: evaluate the positions where `label_mask` is set.
    """

    def __init__(
        self,
        dataset: EventDataset,
        *,
        batch_size: int,
        max_length: int,
        world_size: int = 1,
        rank: int = 0,
        cost: Cost | None = None,
        max_tokens_per_device: int | None = None,
        features: tuple[str, ...] = (),
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        collator = EvalCollator(dataset, max_length=max_length, features=features, windows=EveryTarget)
        self.num_samples = len(collator.windows)
        self.num_targets = int(collator.windows.select(np.arange(self.num_samples)).num_labels.sum())
        self._loader = (
            StepLoader(
                dataset,
                GlobalBatchSampler(self.num_samples, batch_size, shuffle=False),
                collator,
                world_size=world_size,
                rank=rank,
                cost=cost,
                max_tokens_per_device=max_tokens_per_device,
                num_workers=num_workers,
                pin_memory=pin_memory,
            )
            if self.num_samples
            else None
        )

    def __len__(self) -> int:
        """Global batches."""
        return len(self._loader.sampler) if self._loader else 0

    def __iter__(self) -> Iterator[MicroBatch]:
        if self._loader is None:
            return
        self._loader._position = (0, 0)
        for step in self._loader:
            yield from step.micro_batches
