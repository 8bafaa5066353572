"""Exact top-k and ranks over a catalogue whose items are spread over ranks."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from grzoo.embeddings import DynamicEmbeddingCollection
from grzoo.embeddings.hashing import owner
from torch import Tensor

_SCORES_AT_ONCE = 1 << 24
Exclude = tuple[Tensor, Tensor]


class RetrievalModel(Protocol):
    """What a catalogue needs of a model."""

    @property
    def embeddings(self) -> DynamicEmbeddingCollection: ...

    def item_embeddings(self, ids: Tensor) -> Tensor: ...


class ShardedCatalogue:
    """Item vectors of candidates, each on the rank that owns its id; a snapshot, taken when it is made.

    All methods are collective when there is a process group: every rank calls them, with its own queries (0 is fine),
    and gets the answers to its own queries, over the candidates of all ranks. Scores are inner products of
    queries and the model's `item_embeddings`, float32; equal scores are ordered by id. Without a group everything is
    local.

    Args:
        model: with `item_embeddings` (called once, with this rank's candidates).
        candidate_ids: int64 [n] or a sequence of integers, the same on every rank, duplicates dropped; None: all rows
            of the item table.
        process_group: ranks that share the work; needs all rows to be reachable from every rank.

    Raises:
        ValueError: for ids that are not integers, and on every rank for an item whose vector is not finite: its rank
            would mean nothing.
    """

    def __init__(
        self,
        model: RetrievalModel,
        candidate_ids: Tensor | Sequence[int] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.process_group = process_group
        self.world_size = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        if candidate_ids is None:
            candidate_ids = model.embeddings.ids(model.embeddings.features["candidate_ids"].table)
        elif not isinstance(candidate_ids, Tensor):
            dtype = None if len(candidate_ids) else torch.int64
            candidate_ids = torch.as_tensor(candidate_ids, dtype=dtype)
        if candidate_ids.is_floating_point() or candidate_ids.dtype == torch.bool:
            raise ValueError(f"candidate ids must be integers; got {candidate_ids.dtype}.")
        ids = candidate_ids.flatten().long().unique()
        ids = ids[owner(ids, self.world_size) == self.rank]
        self.vectors = model.item_embeddings(ids)
        self.ids = ids.to(self.vectors.device)
        self._check(_vector_problem(self.ids, self.vectors))
        count = torch.tensor([ids.numel()], device=self.vectors.device)
        counts = [int(c) for c in self._all_gather(count)]
        self.num_candidates, self._largest = sum(counts), max(counts)

    def top_k(self, queries: Tensor, k: int, exclude: Exclude | None = None) -> tuple[Tensor, Tensor]:
        """The k best candidates of each query, best first.

        Args:
            queries: [b, D].
            k: at most the number of candidates, the same on every rank.
            exclude: packed ids int64 [E] and their starts int64 [b + 1]: candidates that a query must not get.

        Returns:
            (ids int64 [b, k], scores float32 [b, k]); where fewer than k candidates are left: id -1, score -inf.

        Raises:
            ValueError: for k out of range, or queries that are not finite.
        """
        problem = None
        if not 0 < k <= self.num_candidates:
            problem = f"top_k must lie between 1 and the number of candidates, {self.num_candidates}; got {k}."
        self._check(problem or _input_problem(queries, exclude))
        all_queries, excluded, mine = self._gather(queries, exclude)
        width = min(k, self.ids.numel())
        best_ids = self.ids.new_full((len(all_queries), k), -1)
        best_scores = all_queries.new_full((len(all_queries), k), -torch.inf)
        for part, scores in self._scores(all_queries):
            _mask(scores, self.ids, excluded, part)
            columns = _top_columns(scores, width)
            best_ids[part, :width] = self.ids[columns]
            best_scores[part, :width] = scores.gather(1, columns)
        ids = torch.cat([x[mine] for x in self._all_gather(best_ids)], dim=1)
        scores = torch.cat([x[mine] for x in self._all_gather(best_scores)], dim=1)
        by_id = ids.argsort(dim=1, stable=True)
        order = by_id.gather(1, scores.gather(1, by_id).argsort(dim=1, descending=True, stable=True))[:, :k]
        ids, scores = ids.gather(1, order), scores.gather(1, order)
        return ids.masked_fill(scores == -torch.inf, -1), scores

    def ranks(self, queries: Tensor, target_ids: Tensor, exclude: Exclude | None = None) -> Tensor:
        """Rank of each query's target: 1 + the number of candidates with a higher score, or an equal one and a
        smaller id.

        Excluded candidates do not count; the target itself is never excluded. A target that is no candidate comes
        after all of them.

        Args:
            queries: [b, D].
            target_ids: int64 [b].
            exclude: as in `top_k`.

        Returns:
            int64 [b], from 1.

        Raises:
            ValueError: for queries that are not finite, or targets that do not fit them.
        """
        problem = None
        if target_ids.shape != queries.shape[:1]:
            problem = f"{tuple(target_ids.shape)} target ids do not fit queries of shape {tuple(queries.shape)}."
        self._check(problem or _input_problem(queries, exclude))
        all_queries, excluded, mine = self._gather(queries, exclude)
        targets = torch.cat(self._all_gather_ragged(target_ids.to(self.ids)))
        before = torch.zeros_like(targets)
        for part, scores in self._scores(all_queries):
            target = targets[part].unsqueeze(1)
            is_target = self.ids == target
            bar = (
                scores.masked_fill(~is_target, -torch.inf).amax(1, keepdim=True)
                if scores.shape[1]
                else _nothing(scores)
            )
            if self.process_group is not None:
                dist.all_reduce(bar, op=dist.ReduceOp.MAX, group=self.process_group)
            _mask(scores, self.ids, excluded, part)
            ahead = (scores > bar) | ((scores == bar) & (self.ids < target))
            before[part] = (ahead & ~is_target & (scores > -torch.inf)).sum(1)
        if self.process_group is not None:
            dist.all_reduce(before, group=self.process_group)
        return 1 + before[mine]

    def _scores(self, queries: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Scores [part, local candidates] of slices of the queries; the same slices on every rank."""
        rows = max(1, _SCORES_AT_ONCE // max(1, self._largest))
        for start in range(0, len(queries), rows):
            part = slice(start, min(start + rows, len(queries)))
            yield part, queries[part] @ self.vectors.T

    def _gather(self, queries: Tensor, exclude: Exclude | None) -> tuple[Tensor, Exclude, slice]:
        """Queries and exclusions of all ranks one behind the other, and the slice that is this rank's."""
        queries = queries.to(self.vectors)
        if exclude is None:
            exclude = self.ids.new_empty(0), self.ids.new_zeros(len(queries) + 1)
        ids, starts = (x.to(self.ids) for x in exclude)
        parts = self._all_gather_ragged(queries)
        lengths = torch.cat(self._all_gather_ragged(starts.diff()))
        all_starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        first = sum(len(part) for part in parts[: self.rank])
        excluded = torch.cat(self._all_gather_ragged(ids)), all_starts
        return torch.cat(parts), excluded, slice(first, first + len(queries))

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape."""
        if self.process_group is None:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous(), group=self.process_group)
        return parts

    def _all_gather_ragged(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which may differ in their first dimension."""
        lengths = [int(n) for n in self._all_gather(torch.tensor([len(x)], device=x.device))]
        padded = x.new_zeros((max(lengths), *x.shape[1:]))
        padded[: len(x)] = x
        return [part[:length] for part, length in zip(self._all_gather(padded), lengths, strict=True)]

    def _check(self, problem: str | None) -> None:
        """Raise ValueError on every rank when one of them has a problem, so that none waits in the next collective."""
        bad = torch.tensor([int(problem is not None)], device=self.vectors.device)
        ranks = [rank for rank, flag in enumerate(self._all_gather(bad)) if int(flag)]
        if ranks:
            raise ValueError(problem or f"Rank {ranks[0]} asked for something impossible; see its message.")


def _vector_problem(ids: Tensor, vectors: Tensor) -> str | None:
    low, high = vectors.aminmax(dim=1)  # both are NaN where a number of the row is
    broken = ids[~(low.isfinite() & high.isfinite())]
    if not len(broken):
        return None
    return (
        f"The vectors of {len(broken)} items are not finite, the first is that of item {int(broken[0])}: the model has "
        "diverged, or such rows were imported. Load an earlier checkpoint, or erase these rows."
    )


def _input_problem(queries: Tensor, exclude: Exclude | None) -> str | None:
    if not queries.isfinite().all():
        return "Queries hold values that are not finite: the model has diverged."
    if exclude is not None:
        ids, starts = exclude
        if starts.shape != (len(queries) + 1,) or int(starts[-1]) != len(ids):
            return (
                f"exclude must be packed ids and {len(queries) + 1} starts, the last of which is their number, "
                f"{len(ids)}; got starts of shape {tuple(starts.shape)}."
            )
    return None


def _nothing(scores: Tensor) -> Tensor:
    return scores.new_full((len(scores), 1), -torch.inf)


def _mask(scores: Tensor, ids: Tensor, excluded: Exclude, part: slice) -> None:
    """Set the scores of excluded candidates to -inf; `ids` are sorted, one per column."""
    if not ids.numel():
        return
    wanted, starts = excluded
    first, end = int(starts[part.start]), int(starts[part.stop])
    row = torch.repeat_interleave(starts[part.start : part.stop + 1].diff(), output_size=end - first)
    column = torch.searchsorted(ids, wanted[first:end]).clamp_(max=ids.numel() - 1)
    hit = ids[column] == wanted[first:end]
    scores[row[hit], column[hit]] = -torch.inf


def _top_columns(scores: Tensor, k: int) -> Tensor:
    """int64 [b, k]: columns of the k largest of each row, largest first, the smaller column first among equals."""
    if k == 0 or not len(scores):
        return torch.empty(len(scores), k, dtype=torch.int64, device=scores.device)
    threshold = scores.topk(k, sorted=True).values[:, -1:]
    above, level = scores > threshold, scores == threshold
    taken = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
    columns = taken.nonzero()[:, 1].view(-1, k)
    order = scores.gather(1, columns).argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, order)
