"""Full ranking: every evaluation event against the whole catalogue, which is spread over the ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from grzoo.data import Catalogue, EvalLoader, EventDataset, MicroBatch
from grzoo.models.retrieval import ShardedCatalogue
from numpy.typing import NDArray
from torch import Tensor

from .arguments import EvaluationArguments
from .metrics import ranking_metrics
from .popularity import PopularityRanking
from .runtime import Runtime

_MODEL_FIELDS = ("input_ids", "position_ids", "cu_seq_lens_q", "max_length_q", "timestamps", "target_timestamps")


class Evaluator:
    """Ranks the targets of one split with a model or with the popularity baseline, by the same protocol.

    Args:
        folder: dataset folder.
        split: "validation" or "test".
        catalogue: the candidates are all its items.
        max_length: events of a history that the model sees; the whole history is left out of the ranking all the same.
        max_tokens: events of one forward pass at most.
        cost: the model's cost of samples of given lengths.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        catalogue: Catalogue,
        arguments: EvaluationArguments,
        runtime: Runtime,
        *,
        max_length: int,
        max_tokens: int | None = None,
        cost: Callable[[NDArray[np.int64]], NDArray[np.float64]] | None = None,
    ) -> None:
        self.split, self.catalogue, self.arguments, self.runtime = split, catalogue, arguments, runtime
        self.loader = EvalLoader(
            EventDataset.from_folder(folder, split),
            batch_size=arguments.eval_batch_size,
            max_length=max_length,
            world_size=runtime.world_size,
            rank=runtime.rank,
            cost=cost,
            max_tokens_per_device=max_tokens,
        )

    @property
    def metric_names(self) -> list[str]:
        """What an evaluation gives; the first is the metric that decides unless another is asked for."""
        cutoffs = self.arguments.top_k
        main = f"ndcg@{10 if 10 in cutoffs else max(cutoffs)}"
        names = list(ranking_metrics(torch.ones(1), cutoffs))
        return [main, *(name for name in names if name != main)]

    def __call__(self, model: Any) -> dict[str, float]:
        """Metrics of `model` (its forward gives `query_embeddings`). Collective."""
        device = next(model.parameters()).device
        group = model.embeddings.process_group
        with model.inference():
            candidates = ShardedCatalogue(model, torch.from_numpy(self.catalogue.ids).to(device), group)
            ranks = [self._rank_batch(model, candidates, batch, device) for batch in self.loader]
        return self._metrics(ranks)

    def popularity(self) -> dict[str, float]:
        """Metrics of recommending the items with the most training events. Collective."""
        baseline = PopularityRanking(self.catalogue.ids, self.catalogue.counts)
        ranks = []
        for batch in self.loader:
            targets, seen, offsets = (part.numpy() for part in self._targets(batch))
            ranks.append(torch.from_numpy(baseline.ranks(targets, seen, offsets)))
        return self._metrics(ranks)

    def _rank_batch(self, model: Any, candidates: ShardedCatalogue, batch: MicroBatch, device: torch.device) -> Tensor:
        targets, seen, offsets = (part.to(device) for part in self._targets(batch))
        fields = {name: batch[name] for name in _MODEL_FIELDS if name in batch}
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in fields.items()}
        mask = _mask(batch).to(device)
        queries = model(**inputs).query_embeddings[0][mask].float()
        return candidates.ranks(queries, targets, (seen, offsets)).cpu()

    def _targets(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Targets int64 [n], what their users had seen before int64 [S], and where each target's part starts [n + 1].

        With `exclude_seen` off the parts are empty.
        """
        mask, index = _mask(batch), _tensor(batch, "label_index")[0]
        targets = _tensor(batch, "labels")[0][mask]
        seen_counts = index[mask] if self.arguments.exclude_seen else torch.zeros_like(targets)
        starts, lengths = _tensor(batch, "cu_seen").long(), _tensor(batch, "cu_seq_lens_q").long().diff()
        user = torch.arange(len(lengths)).repeat_interleave(lengths)[mask]
        offsets = torch.zeros(len(targets) + 1, dtype=torch.int64)
        torch.cumsum(seen_counts, 0, out=offsets[1:])
        within = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(seen_counts)
        seen = _tensor(batch, "seen_item_ids")[starts[user].repeat_interleave(seen_counts) + within]
        return targets, seen, offsets

    def _metrics(self, ranks: list[Tensor]) -> dict[str, float]:
        mine = torch.cat([*ranks, torch.zeros(0, dtype=torch.int64)])
        return ranking_metrics(gather(mine, self.runtime), self.arguments.top_k)


def gather(values: Tensor, runtime: Runtime) -> Tensor:
    """Concatenates int64 [n] of all ranks, rank after rank, on every rank. Collective."""
    if runtime.world_size == 1:
        return values
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(runtime.world_size)]
    dist.all_gather(sizes, torch.tensor([len(values)]))
    padded = values.new_zeros(int(max(sizes)))
    padded[: len(values)] = values
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def _mask(batch: MicroBatch) -> Tensor:
    return _tensor(batch, "label_mask")[0]


def _tensor(batch: MicroBatch, name: str) -> Tensor:
    value = batch[name]
    assert isinstance(value, Tensor)
    return value
