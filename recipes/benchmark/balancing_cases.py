"""Lengths, cost models and contestants of the balancing benchmark."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from grzoo.data.balancing import Cost, MicroBatchPlan, plan_micro_batches, token_cost
from grzoo.data.prepare import PrepareConfig, movielens
from grzoo.models import HSTUConfig
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Planner = Callable[[Int64, int, int], MicroBatchPlan]  # lengths int [n], ranks, micro-batches -> plan

MTGR_SMALL = (3, 512)  # layers, width
ZIPF_SHORTEST, ZIPF_LONGEST, ZIPF_USERS = 5, 4096, 100_000
MOVIELENS_CUT = 1024


def hstu_cost(lengths: Int64) -> NDArray[np.float64]:
    """FLOPs of HSTU in the paper's size for MovieLens-1M, int [n] -> float64 [n]."""
    return HSTUConfig().flops(lengths)


def mtgr_cost(lengths: Int64) -> NDArray[np.float64]:
    """FLOPs of MTGR-small, `n_layer (10 L d^2 + 4 L^2 d)`, int [n] -> float64 [n] (arXiv 2505.18654)."""
    layers, width = MTGR_SMALL
    events = np.asarray(lengths, dtype=np.float64)
    return layers * (10 * events * width**2 + 4 * events**2 * width)


COSTS: dict[str, Cost] = {"hstu": hstu_cost, "mtgr": mtgr_cost}


@dataclass(frozen=True)
class Case:
    """Inputs per user of a data set after truncation, int64 [users].

    headline: counts for the headline figures; the others show what truncation does.
    """

    name: str
    lengths: Int64
    max_length: int
    headline: bool

    def batch(self, size: int, seed: int) -> Int64:
        """Lengths of a random global batch, int64 [size]; users repeat where there are fewer than `size`."""
        generator = np.random.default_rng([seed, size])
        return generator.choice(self.lengths, size, replace=len(self.lengths) < size)


def cases(quick: bool) -> list[Case]:
    """The data sets; those below $GRZOO_DATA are left out, with a message, where it does not hold them."""
    found = []
    for name in ("ml-1m", "ml-latest-small"):
        events = movielens_events(name)
        if events is None:
            continue
        found.append(_cut(name, events, MOVIELENS_CUT, headline=True))
        if not quick:
            found.append(_cut(name, events, int(events.max()), headline=False))
            if name == "ml-1m":
                found.append(_cut(name, events, HSTUConfig().max_sequence_length, headline=True))
    return [*found, Case("zipf", zipf_lengths(ZIPF_USERS), ZIPF_LONGEST, headline=True)]


def movielens_events(name: str) -> Int64 | None:
    """Events per user, int64 [users]; None where $GRZOO_DATA has no such folder."""
    root = os.environ.get("GRZOO_DATA")
    if not root or not (Path(root) / name).is_dir():
        print(f"{name} is left out: $GRZOO_DATA names no folder that holds it", file=sys.stderr)
        return None
    log = movielens.read(PrepareConfig(name=name, output_dir="", source=str(Path(root) / name)))
    return np.unique(log.users.to_numpy(), return_counts=True)[1].astype(np.int64)


def zipf_lengths(users: int) -> Int64:
    """Lengths 5..4,096 with probability proportional to 1 / length, int64 [users]: mean about 600."""
    possible = np.arange(ZIPF_SHORTEST, ZIPF_LONGEST + 1)
    weights = 1 / possible
    return np.random.default_rng(0).choice(possible, users, p=weights / weights.sum()).astype(np.int64)


def _cut(name: str, events: Int64, max_length: int, headline: bool) -> Case:
    # Each event but the last is an input.
    inputs = events[events > 1] - 1
    return Case(name, np.minimum(inputs, max_length), int(min(max_length, inputs.max())), headline)


def plan_random(lengths: Int64, world_size: int, micro_batches: int) -> MicroBatchPlan:
    """As many users for each rank and micro-batch, in the (random) order of the batch."""
    place = np.arange(len(lengths)) * world_size * micro_batches // len(lengths)
    return MicroBatchPlan(place // world_size, place % world_size, micro_batches)


def plan_tokens(lengths: Int64, world_size: int, micro_batches: int) -> MicroBatchPlan:
    """Equal numbers of tokens: the same partition as ours, with the tokens as cost."""
    return plan_micro_batches(token_cost(lengths), lengths, world_size, micro_batches=micro_batches)


def plan_ours(cost: Cost) -> Planner:
    """Equal cost."""

    def plan(lengths: Int64, world_size: int, micro_batches: int) -> MicroBatchPlan:
        return plan_micro_batches(cost(lengths), lengths, world_size, micro_batches=micro_batches)

    return plan


def plan_transformers(lengths: Int64, world_size: int, micro_batches: int) -> MicroBatchPlan:
    """The partition of transformers' `BatchRebalanceSampler`, by its own cost (padded tokens + 0.001 L^2 each).

    Its public iterator yields one rank's micro-batches and computes the whole partition for that; `_assign`, which it
    calls, returns those of all ranks, so that the partition is computed once instead of `world_size` times.
    """
    sampler = rebalance_sampler(lengths, world_size, micro_batches)
    ranks = sampler._assign(list(range(len(lengths))), lengths.tolist())
    micro_batch, rank = np.zeros(len(lengths), dtype=np.int64), np.zeros(len(lengths), dtype=np.int64)
    for r, members in enumerate(ranks):
        for k, rows in enumerate(members):
            micro_batch[rows], rank[rows] = k, r
    return MicroBatchPlan(micro_batch, rank, micro_batches)


def rebalance_sampler(lengths: Int64, world_size: int, micro_batches: int, rank: int = 0) -> Any:
    """The sampler over one global batch, in its order. Raises ImportError in releases of transformers without it."""
    from transformers.trainer_pt_utils import BatchRebalanceSampler

    return BatchRebalanceSampler(
        lengths.tolist(), len(lengths), dp_size=world_size, grad_accum=micro_batches, shuffle=False, rank=rank
    )
