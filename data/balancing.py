"""Balanced partition of a global batch: which device computes which sample, in which micro-batch.

It is a pure function of the costs and the token counts of the global batch, which all ranks know: every rank computes
the same partition, nothing is communicated, and no sample changes its step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .jagged import Int64

Cost = Callable[[NDArray[np.int64]], NDArray[np.float64]]
Float64 = NDArray[np.float64]

_REFINEMENTS = 200
_CLOSE_ENOUGH = 1e-3
_NEIGHBOURS = 3
_SMALLEST = 4


def token_cost(tokens: NDArray[np.int64]) -> Float64:
    """Cost of samples of the given lengths (int [n]) when it is linear: their tokens, float64 [n]."""
    return np.asarray(tokens, dtype=np.float64)


@dataclass(frozen=True)
class MicroBatchPlan:
    """Where each sample of a global batch is computed.

    micro_batch, rank: int64 [n], the place of each sample.  num_micro_batches: the same for every rank.
    """

    micro_batch: Int64
    rank: Int64
    num_micro_batches: int

    def members(self, micro_batch: int, rank: int) -> Int64:
        """The samples of a micro-batch, in the order of the global batch, int64 [k]."""
        return np.flatnonzero((self.micro_batch == micro_batch) & (self.rank == rank))


def partition(costs: ArrayLike, tokens: ArrayLike, num_bins: int, max_tokens: int | None = None) -> Int64:
    """The bin of each sample so that the largest cost of a bin is small and no bin holds more than `max_tokens`.

    costs: float [n].  tokens: int [n].  Returns int64 [n] in [0, num_bins); bins may stay empty.
    Longest-processing-time-first greedy (Graham, 1969), then exchanges between the largest and the smallest bins.
    Deterministic: ties go to the earlier sample and the lower bin. Raises ValueError when a sample exceeds
    `max_tokens` or no partition within it is found.
    """
    bins = try_partition(costs, tokens, num_bins, max_tokens)
    if bins is None:
        total = int(np.sum(tokens))
        raise ValueError(
            f"{total} tokens do not fit into {num_bins} bins of {max_tokens}: use more micro-batches or a larger budget"
        )
    return bins


def try_partition(costs: ArrayLike, tokens: ArrayLike, num_bins: int, max_tokens: int | None = None) -> Int64 | None:
    """As `partition`, but None when no partition within the budget is found."""
    cost, count = np.asarray(costs, dtype=np.float64), np.asarray(tokens, dtype=np.int64)
    _check(cost, count, num_bins, max_tokens)
    if num_bins == 1:
        fits = max_tokens is None or int(count.sum()) <= max_tokens
        return np.zeros(len(cost), dtype=np.int64) if fits else None
    if max_tokens is None:
        return _refine(cost, count, longest_first(cost, num_bins), num_bins, None)
    if int(count.sum()) > num_bins * max_tokens:
        return None
    bins = _longest_first_within(cost, count, num_bins, max_tokens)
    if bins is None:
        bins = _best_fit(count, num_bins, max_tokens)
    return None if bins is None else _refine(cost, count, bins, num_bins, max_tokens)


def plan_micro_batches(
    costs: ArrayLike,
    tokens: ArrayLike,
    world_size: int,
    max_tokens: int | None = None,
    micro_batches: int | None = None,
) -> MicroBatchPlan:
    """Partition a global batch into `world_size` x micro-batches, the k-th micro-batches of the ranks alike.

    costs, tokens: [n], of each sample.  max_tokens: budget of a micro-batch.  micro_batches: their number per rank;
    None takes the least that the budget allows (1 without a budget).  Collectives inside a micro-batch make its ranks
    wait for each other, so what is kept small is the sum over k of the largest k-th micro-batch. Raises ValueError as
    `partition`.
    """
    if world_size < 1 or (micro_batches is not None and micro_batches < 1):
        raise ValueError(f"world_size and micro_batches must be at least 1, got {world_size} and {micro_batches}")
    cost, count = np.asarray(costs, dtype=np.float64), np.asarray(tokens, dtype=np.int64)
    if micro_batches is not None:
        plan = _plan(cost, count, world_size, micro_batches, max_tokens)
        if plan is None:
            raise ValueError(
                f"{int(count.sum())} tokens do not fit into {world_size} ranks x {micro_batches} micro-batches of "
                f"{max_tokens} tokens: use more micro-batches or a larger budget"
            )
        return plan
    least = 1 if max_tokens is None else max(1, -(-int(count.sum()) // (world_size * max_tokens)))
    # One sample per bin always fits, so the search ends.
    for number in range(least, max(least, -(-len(count) // world_size)) + 1):
        plan = _plan(cost, count, world_size, number, max_tokens)
        if plan is not None:
            return plan
    raise AssertionError("one sample per bin fits every budget that the largest sample fits")


def _plan(cost: Float64, count: Int64, world_size: int, number: int, max_tokens: int | None) -> MicroBatchPlan | None:
    """Equal micro-batches or those of falling cost, whose ranks wait less; None when neither keeps the budget.

    The second kind is not tried when the first is near the bound. Samples below an equal share make equal ones likely.
    """
    share = float(cost.sum()) / world_size
    bound = max(float(cost.max(initial=0.0)), share)
    kinds = [_equal] if number == 1 else [_falling, _equal]
    if cost.max(initial=0.0) <= share / number:
        kinds.reverse()
    plans: list[MicroBatchPlan] = []
    for kind in kinds:
        plan = kind(cost, count, world_size, number, max_tokens)
        if plan is not None:
            plans.append(plan)
            if step_cost(cost, plan, world_size) <= bound * (1 + _CLOSE_ENOUGH):
                return plan
    return min(plans, key=lambda plan: step_cost(cost, plan, world_size), default=None)


def step_cost(costs: ArrayLike, plan: MicroBatchPlan, world_size: int) -> float:
    """Sum over micro-batches of the cost of the slowest rank: the time of a step whose ranks wait for each other."""
    loads = bin_costs(costs, plan.micro_batch * world_size + plan.rank, plan.num_micro_batches * world_size)
    return float(loads.reshape(-1, world_size).max(axis=1).sum())


def bin_costs(costs: ArrayLike, bins: Int64, num_bins: int) -> Float64:
    """Cost of every bin, float64 [num_bins]."""
    loads = np.bincount(bins, weights=np.asarray(costs, dtype=np.float64), minlength=num_bins)
    return loads.astype(np.float64, copy=False)


def _check(cost: Float64, count: Int64, num_bins: int, max_tokens: int | None) -> None:
    if len(cost) != len(count):
        raise ValueError(f"{len(cost)} costs for {len(count)} token counts")
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    if not np.isfinite(cost).all() or (cost < 0).any():
        raise ValueError("costs must be finite and not negative")
    if max_tokens is not None and len(count) and int(count.max()) > max_tokens:
        raise ValueError(
            f"a sequence of {int(count.max())} tokens exceeds the budget of {max_tokens} tokens per device: raise "
            "max_tokens_per_device or lower max_length"
        )


def _descending(values: ArrayLike) -> list[int]:
    return np.argsort(-np.asarray(values, dtype=np.float64), kind="stable").tolist()


def longest_first(cost: Float64, num_bins: int) -> Int64:
    """Each sample [n], the costliest first, to the bin that holds least; int64 [n]."""
    heap = [(0.0, index) for index in range(num_bins)]
    bins = np.zeros(len(cost), dtype=np.int64)
    order = _descending(cost)
    values = cost.tolist()
    chosen = []
    for sample in order:
        load, index = heap[0]
        chosen.append(index)
        heapreplace(heap, (load + values[sample], index))
    bins[order] = chosen
    return bins


def _longest_first_within(cost: Float64, count: Int64, num_bins: int, max_tokens: int) -> Int64 | None:
    """Each sample to the cheapest bin that has room for it; None when a sample finds none."""
    heap = [(0.0, index) for index in range(num_bins)]
    heapify(heap)
    room = [max_tokens] * num_bins
    bins = np.zeros(len(cost), dtype=np.int64)
    values, sizes = cost.tolist(), count.tolist()
    for sample in _descending(cost):
        full = []
        while heap and room[heap[0][1]] < sizes[sample]:
            full.append(heappop(heap))
        if not heap:
            return None
        load, index = heap[0]
        heapreplace(heap, (load + values[sample], index))
        room[index] -= sizes[sample]
        bins[sample] = index
        for entry in full:
            heappush(heap, entry)
    return bins


def _best_fit(count: Int64, num_bins: int, max_tokens: int) -> Int64 | None:
    """Largest first into the fullest bin with room, by tokens: for budgets that leave little room."""
    room = np.full(num_bins, max_tokens, dtype=np.int64)
    bins = np.zeros(len(count), dtype=np.int64)
    for sample in _descending(count):
        left = np.where(room >= count[sample], room, np.iinfo(np.int64).max)
        index = int(left.argmin())
        if room[index] < count[sample]:
            return None
        room[index] -= count[sample]
        bins[sample] = index
    return bins


def _refine(cost: Float64, count: Int64, bins: Int64, num_bins: int, max_tokens: int | None) -> Int64:
    """Exchange (or move) samples between the largest and the smallest bins while the largest cost falls."""
    loads = bin_costs(cost, bins, num_bins)
    target = max(float(cost.max(initial=0.0)), float(loads.mean())) * (1 + _CLOSE_ENOUGH)
    used = np.bincount(bins, weights=count, minlength=num_bins).astype(np.int64)
    for _ in range(_REFINEMENTS):
        largest = int(loads.argmax())
        if loads[largest] <= target:
            break
        few = np.argpartition(loads, min(_SMALLEST, num_bins) - 1)[:_SMALLEST]
        for other in few[np.lexsort((few, loads[few]))].tolist():
            if other != largest and _exchange(cost, count, bins, loads, used, largest, other, max_tokens):
                break
        else:
            break
    return bins


def _exchange(
    cost: Float64, count: Int64, bins: Int64, loads: Float64, used: Int64, high: int, low: int, max_tokens: int | None
) -> bool:
    """The best exchange of one sample of `high` for one (or none) of `low`, if it lowers their larger cost.

    The larger cost falls, then rises with the cost that moves: of the samples of `low` only those next to the best one
    are tried for each of `high`. That misses nothing but exchanges to which a budget would force.
    """
    give, take = np.flatnonzero(bins == high), np.flatnonzero(bins == low)
    if not len(give):
        return False
    take_cost, take_count = np.append(cost[take], 0.0), np.append(count[take], 0)
    order = np.argsort(take_cost, kind="stable")
    wanted = cost[give] - (loads[high] - loads[low]) / 2
    near = np.searchsorted(take_cost[order], wanted)[:, None] + np.arange(-_NEIGHBOURS, _NEIGHBOURS)
    partner = order[np.clip(near, 0, len(order) - 1)]
    moved = cost[give][:, None] - take_cost[partner]
    tokens = count[give][:, None] - take_count[partner]
    after = np.maximum(loads[high] - moved, loads[low] + moved)
    if max_tokens is not None:
        after[(used[low] + tokens > max_tokens) | (used[high] - tokens > max_tokens)] = np.inf
    i, j = divmod(int(after.argmin()), after.shape[1])
    if after[i, j] >= loads[high] * (1 - 1e-9):
        return False
    bins[give[i]] = low
    if partner[i, j] < len(take):
        bins[take[partner[i, j]]] = high
    loads[high] -= moved[i, j]
    loads[low] += moved[i, j]
    used[high] -= tokens[i, j]
    used[low] += tokens[i, j]
    return True


def _equal(cost: Float64, count: Int64, world_size: int, number: int, max_tokens: int | None) -> MicroBatchPlan | None:
    """One partition into all bins, sorted by cost and dealt to the ranks, every second micro-batch backwards."""
    bins = try_partition(cost, count, world_size * number, max_tokens)
    if bins is None:
        return None
    order = np.argsort(-bin_costs(cost, bins, world_size * number), kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    micro_batch, rank = np.divmod(place, world_size)
    rank = np.where(micro_batch % 2 == 1, world_size - 1 - rank, rank)
    return MicroBatchPlan(micro_batch[bins], rank[bins], number)


def _falling(
    cost: Float64, count: Int64, world_size: int, number: int, max_tokens: int | None
) -> MicroBatchPlan | None:
    """Micro-batches of falling cost: the first is as costly as the longest sample, so that no rank waits for it.

    Each takes, longest first, what fits below its level: the larger of the longest sample left and an equal share of
    what is left. The last one is an ordinary partition of the rest.
    """
    micro_batch, rank = np.zeros(len(cost), dtype=np.int64), np.zeros(len(cost), dtype=np.int64)
    left = np.array(_descending(cost), dtype=np.int64)
    for index in range(number - 1):
        if not len(left):
            break
        level = max(float(cost[left[0]]), float(cost[left].sum()) / (world_size * (number - index)))
        chosen = _fill(cost[left].tolist(), count[left].tolist(), world_size, level, max_tokens)
        taken = chosen >= 0
        micro_batch[left[taken]], rank[left[taken]] = index, chosen[taken]
        left = left[~taken]
    bins = try_partition(cost[left], count[left], world_size, max_tokens)
    if bins is None:
        return None
    micro_batch[left], rank[left] = number - 1, bins
    return MicroBatchPlan(micro_batch, rank, number)


def _fill(costs: list[float], tokens: list[int], num_bins: int, level: float, max_tokens: int | None) -> Int64:
    """Each sample in order to the cheapest bin, if that stays below `level` and the budget; -1 for the others."""
    heap = [(0.0, index) for index in range(num_bins)]
    room = [sum(tokens) if max_tokens is None else max_tokens] * num_bins
    limit = level * (1 + 1e-12)
    least = costs[-1]
    chosen = np.full(len(costs), -1, dtype=np.int64)
    for sample, (cost, count) in enumerate(zip(costs, tokens, strict=True)):
        load, index = heap[0]
        if load + least > limit:
            break  # not even the cheapest sample fits any more
        if load + cost <= limit and count <= room[index]:
            heapreplace(heap, (load + cost, index))
            room[index] -= count
            chosen[sample] = index
    return chosen
