"""Balance of a global batch over ranks: random fixed-size batches, equal tokens, transformers' sampler, equal cost.

    GRZOO_DATA=FOLDER python -m grzoo.recipes.benchmark.balancing --quick

Ranks wait for each other in each micro-batch, so a step takes the sum over micro-batches of the slowest rank's cost.
`imbalance` is that over total cost / ranks (sums over the steps; 1 is perfect). All contestants divide the same
global batches of ranks x 32 users (with replacement where a data set has fewer), for two cost models.
    bound             no partition is better: the costliest sequence of a step over total / ranks, at least 1
    speedup           time of the random batches over the contestant's, if time were the cost model's
    speedup_bound     the same for a partition that reaches `bound`
    padding           share of the tokens that would be padding, were each micro-batch padded to its longest sequence
    padded_imbalance  `imbalance` of the padded micro-batches, still over the jagged total / ranks
    plan_ms, p95      time of the partition of a step, which each rank computes on one core (plan_cpu_ms: CPU time)

Histories of ml-1m are cut to their last 1,024 and 200 (HSTU's paper) inputs, those of ml-latest-small to 1,024. Uncut
ones are measured beside the headline figures: there one user alone may cost more than a rank's share. Zipf lengths are
5 to 4,096. transformers' sampler takes a second at 128 ranks: it runs on the first steps only. The last line holds the
worst of the data sets at 128 ranks, HSTU's cost and one micro-batch, unless its names say otherwise; `padding_avoided`
is the padding of random batches.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from grzoo.data.balancing import Cost, MicroBatchPlan, bin_costs
from numpy.typing import NDArray

from .balancing_cases import (
    COSTS,
    Case,
    Int64,
    Planner,
    cases,
    plan_ours,
    plan_random,
    plan_tokens,
    plan_transformers,
    rebalance_sampler,
)
from .balancing_plot import plot
from .reporting import print_headline, write_rows

Float64 = NDArray[np.float64]

WORLDS = (8, 64, 128)
MICRO_BATCHES = (1, 2, 4)
USERS_PER_RANK = 32


@dataclass
class Record:
    """What one contestant did in the measured steps, one entry per step."""

    slowest: list[float] = field(default_factory=list)
    padded_slowest: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    padded_tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    rank_costs: list[Float64] = field(default_factory=list)  # [ranks], over total / ranks

    def add(self, cost: Cost, lengths: Int64, plan: MicroBatchPlan, world_size: int) -> None:
        """Record a step."""
        bins, number = plan.micro_batch * world_size + plan.rank, plan.num_micro_batches * world_size
        costs = cost(lengths)
        loads = bin_costs(costs, bins, number).reshape(-1, world_size)
        longest = np.zeros(number, dtype=np.int64)
        np.maximum.at(longest, bins, lengths)
        users = np.bincount(bins, minlength=number)
        self.slowest.append(float(loads.max(axis=1).sum()))
        self.padded_slowest.append(float((users * cost(longest)).reshape(-1, world_size).max(axis=1).sum()))
        self.tokens.append(int(lengths.sum()))
        self.padded_tokens.append(int((users * longest).sum()))
        self.rank_costs.append(loads.sum(axis=0) * world_size / costs.sum())


@dataclass
class Comparison:
    """All contestants on the same steps of one case, world size, number of micro-batches and cost model."""

    case: Case
    world_size: int
    micro_batches: int
    cost: str
    ideal: list[float] = field(default_factory=list)  # per step: total / ranks
    bound: list[float] = field(default_factory=list)  # per step: the larger of it and the costliest sequence
    records: dict[str, Record] = field(default_factory=dict)

    def imbalance(self, contestant: str) -> float:
        """Time over that of perfect balance, over the steps that the contestant ran."""
        slowest = self.records[contestant].slowest
        return sum(slowest) / sum(self.ideal[: len(slowest)])

    def least(self, steps: int | None = None) -> float:
        """The imbalance below which no partition gets."""
        return sum(self.bound[:steps]) / sum(self.ideal[:steps])

    def rank_costs(self, contestant: str) -> Float64:
        """Cost of each rank in each step over total / ranks, float64 [steps, ranks]."""
        return np.stack(self.records[contestant].rank_costs)

    def rows(self) -> list[dict[str, Any]]:
        """CSV rows, one per contestant."""
        return [self._row(name, record) for name, record in self.records.items()]

    def _row(self, name: str, record: Record) -> dict[str, Any]:
        steps = len(record.slowest)
        ideal, random = self.ideal[:steps], sum(self.records["random"].slowest[:steps])
        median, p95 = np.percentile(np.asarray(record.seconds) * 1e3, [50, 95])
        figures = {
            "imbalance": sum(record.slowest) / sum(ideal),
            "bound": self.least(steps),
            "worst_step": max(x / y for x, y in zip(record.slowest, ideal, strict=True)),
            "speedup": random / sum(record.slowest),
            "speedup_bound": random / sum(self.bound[:steps]),
            "padding": 1 - sum(record.tokens) / sum(record.padded_tokens),
            "padded_imbalance": sum(record.padded_slowest) / sum(ideal),
            "plan_ms": float(median),
            "plan_p95_ms": float(p95),
            "plan_cpu_ms": float(np.median(record.cpu_seconds)) * 1e3,
        }
        about = {"data": self.case.name, "max_length": self.case.max_length, "headline": self.case.headline}
        about |= {"mean_length": round(float(self.case.lengths.mean()), 1), "users": len(self.case.lengths)}
        about |= {"ranks": self.world_size, "micro_batches": self.micro_batches, "cost": self.cost}
        return about | {"contestant": name, "steps": steps} | {key: round(x, 4) for key, x in figures.items()}


def compare(case: Case, world_size: int, micro_batches: int, steps: int, sampler_steps: int) -> list[Comparison]:
    """Run the contestants in turn on the same global batches; one Comparison per cost model.

    sampler_steps: on how many of the first steps transformers' sampler runs.
    """
    found = {name: Comparison(case, world_size, micro_batches, name) for name in COSTS}
    shared: dict[str, Planner] = {"random": plan_random, "tokens": plan_tokens, "transformers": plan_transformers}
    for step in range(steps):
        lengths = case.batch(world_size * USERS_PER_RANK, step)
        for name, comparison in found.items():
            costs = COSTS[name](lengths)
            comparison.ideal.append(float(costs.sum()) / world_size)
            comparison.bound.append(max(comparison.ideal[-1], float(costs.max())))
            _run("ours", plan_ours(COSTS[name]), [comparison], lengths)
        for contestant, planner in shared.items():
            if contestant != "transformers" or step < sampler_steps:
                _run(contestant, planner, list(found.values()), lengths)
    return list(found.values())


def _run(contestant: str, planner: Planner, comparisons: Sequence[Comparison], lengths: Int64) -> None:
    world_size, micro_batches = comparisons[0].world_size, comparisons[0].micro_batches
    start, cpu_start = time.perf_counter(), time.thread_time()
    plan = planner(lengths, world_size, micro_batches)
    seconds, cpu_seconds = time.perf_counter() - start, time.thread_time() - cpu_start
    for comparison in comparisons:
        record = comparison.records.setdefault(contestant, Record())
        record.add(COSTS[comparison.cost], lengths, plan, world_size)
        record.seconds.append(seconds)
        record.cpu_seconds.append(cpu_seconds)


def headline(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The headline figures by name, of the largest number of ranks: worst of the data sets."""
    most = max(x.world_size for x in comparisons)
    at = [x for x in comparisons if x.world_size == most]
    cut = [x for x in at if x.case.headline]
    one = [x for x in cut if x.micro_batches == 1 and x.cost == "hstu"]
    whole = [x for x in at if not x.case.headline and x.micro_batches == 1 and x.cost == "hstu"]
    figures = {"imbalance": max(x.imbalance("ours") for x in one), "bound": max(x.least() for x in one)}
    for number in sorted({x.micro_batches for x in cut} - {1}):
        chosen = [x for x in cut if x.micro_batches == number and x.cost == "hstu"]
        figures[f"imbalance_{number}_micro_batches"] = max(x.imbalance("ours") for x in chosen)
    mtgr = [x for x in cut if x.micro_batches == 1 and x.cost == "mtgr"]
    figures["imbalance_mtgr"] = max(x.imbalance("ours") for x in mtgr)
    for name in ("random", "tokens", "transformers"):
        if name in one[0].records:
            figures[f"imbalance_{name}"] = max(x.imbalance(name) for x in one)
    if whole:
        figures["imbalance_uncut"] = max(x.imbalance("ours") for x in whole)
        figures["bound_uncut"] = max(x.least() for x in whole)
    figures["speedup"] = min(x.imbalance("random") / x.imbalance("ours") for x in one)
    figures["speedup_bound_hstu"] = max(x.imbalance("random") / x.least() for x in one)
    figures["speedup_bound_mtgr"] = max(x.imbalance("random") / x.least() for x in mtgr)
    figures["padding_avoided"] = min(_padding(x) for x in one)
    figures["plan_ms"], figures["plan_p95_ms"] = _plan_ms(one)
    last = max(x.micro_batches for x in cut)
    slow = _plan_ms([x for x in cut if x.micro_batches == last])
    figures[f"plan_ms_{last}_micro_batches"], figures[f"plan_p95_ms_{last}_micro_batches"] = slow
    names = [f"{x.case.name} <= {x.case.max_length}" for x in one]
    return {key: round(value, 4) for key, value in figures.items()} | {"ranks": most, "data": names}


def _plan_ms(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """Median and 95th percentile of our partition's time, the worst of the comparisons."""
    times = np.array([np.percentile(x.records["ours"].seconds, [50, 95]) for x in comparisons]) * 1e3
    return float(times[:, 0].max()), float(times[:, 1].max())


def _padding(comparison: Comparison) -> float:
    """Share of padding in random batches, which jagged ones do not compute."""
    record = comparison.records["random"]
    return 1 - sum(record.tokens) / sum(record.padded_tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare on all data sets, write rows and plot, end with the headline figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer steps and data sets: under a minute")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    parser.add_argument("--plot", type=Path, default=Path("outputs/benchmark/balancing.png"), help="PNG to write")
    options = parser.parse_args(arguments)
    steps, sampler_steps = (6, 1) if options.quick else (50, 3)
    try:
        rebalance_sampler(np.ones(1, dtype=np.int64), 1, 1)
    except ImportError:
        print("transformers' sampler is left out: this release has no BatchRebalanceSampler", file=sys.stderr)
        sampler_steps = 0
    comparisons = [
        comparison
        for case in cases(options.quick)
        for world_size in WORLDS
        for micro_batches in MICRO_BATCHES
        for comparison in compare(case, world_size, micro_batches, steps, sampler_steps)
    ]
    write_rows([row for comparison in comparisons for row in comparison.rows()], options.csv)
    most = [x for x in comparisons if x.world_size == max(WORLDS) and x.case.headline]
    shown = [x for x in most if x.micro_batches == 1 and x.cost == "hstu"]
    panels = {f"{x.case.name} <= {x.case.max_length:,}": [x.rank_costs("random"), x.rank_costs("ours")] for x in shown}
    plot(panels, ("random", "ours"), f"step ({max(WORLDS)} ranks x {USERS_PER_RANK} users)", options.plot)
    print_headline(headline(comparisons))


if __name__ == "__main__":
    main()
