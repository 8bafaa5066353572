"""Ways to partition a global batch, compared: longest first, Karmarkar-Karp, and longest first with refinement.

    GRZOO_DATA=FOLDER python -m grzoo.recipes.benchmark.balancing_algorithms

All divide the same batches of ranks x 32 users by HSTU's cost into one bin per rank. `imbalance` is the largest bin
over the larger of the mean and the costliest sample (1 cannot be beaten); `worst` its largest of the steps, `ms` the
median CPU time of a partition.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
from grzoo.data.balancing import bin_costs, longest_first, partition
from numpy.typing import NDArray

from .balancing_cases import Case, Int64, cases, hstu_cost
from .reporting import print_headline, write_rows

RANKS = (8, 128)
USERS_PER_RANK = 32
Float64 = NDArray[np.float64]


def karmarkar_karp(cost: Float64, num_bins: int) -> Int64:
    """The bin of each sample, int64 [n], by the largest differencing method (Karmarkar and Karp, 1982) for many bins.

    A partial solution is its bins' loads, descending. The two with the largest spread are joined, the largest bin of
    one with the smallest of the other, until one is left; then the joins are undone to find each sample's bin.
    """
    samples = len(cost)
    loads: dict[int, Float64] = {}
    for sample in range(samples):
        loads[sample] = np.zeros(num_bins)
        loads[sample][0] = cost[sample]
    heap = [(-float(value), sample) for sample, value in enumerate(cost)]
    heapify(heap)
    joins: list[tuple[int, int, int, Int64]] = []
    for joined in range(samples, 2 * samples - 1):
        (_, first), (_, second) = heappop(heap), heappop(heap)
        total = loads.pop(first) + loads.pop(second)[::-1]
        order = np.argsort(-total, kind="stable")
        loads[joined] = total[order]
        joins.append((joined, first, second, order))
        heappush(heap, (-float(loads[joined][0] - loads[joined][-1]), joined))
    bins = {max(2 * samples - 2, 0): np.arange(num_bins)}  # of a partial solution: the final bin of each of its bins
    for joined, first, second, order in reversed(joins):
        final = np.empty(num_bins, dtype=np.int64)
        final[order] = bins.pop(joined)
        bins[first], bins[second] = final, final[::-1]
    return np.array([bins[sample][0] for sample in range(samples)], dtype=np.int64)


ALGORITHMS: dict[str, Callable[[Float64, int], Int64]] = {
    "longest first": longest_first,
    "Karmarkar-Karp": karmarkar_karp,
    "longest first, refined": lambda cost, bins: partition(cost, np.ones(len(cost), dtype=np.int64), bins),
}


def compare(case: Case, ranks: int, steps: int) -> list[dict[str, Any]]:
    """CSV rows, one per algorithm."""
    imbalance: dict[str, list[float]] = {name: [] for name in ALGORITHMS}
    seconds: dict[str, list[float]] = {name: [] for name in ALGORITHMS}
    for step in range(steps):
        cost = hstu_cost(case.batch(ranks * USERS_PER_RANK, step))
        bound = max(float(cost.max()), float(cost.sum()) / ranks)
        for name, algorithm in ALGORITHMS.items():
            began = time.thread_time()
            bins = algorithm(cost, ranks)
            seconds[name].append(time.thread_time() - began)
            imbalance[name].append(float(bin_costs(cost, bins, ranks).max()) / bound)
    about = {"data": case.name, "max_length": case.max_length, "ranks": ranks, "steps": steps}
    return [
        about
        | {"algorithm": name, "imbalance": round(float(np.mean(imbalance[name])), 6)}
        | {"worst": round(max(imbalance[name]), 6), "ms": round(float(np.median(seconds[name])) * 1e3, 2)}
        for name in ALGORITHMS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare on all data sets, write rows, end with the headline figures: the worst data set of each algorithm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    options = parser.parse_args(arguments)
    chosen = [case for case in cases(options.quick) if case.headline]
    rows = [row for case in chosen for ranks in RANKS for row in compare(case, ranks, 2 if options.quick else 5)]
    write_rows(rows, options.csv)
    most = [row for row in rows if row["ranks"] == max(RANKS)]
    print_headline({name: max(row["imbalance"] for row in most if row["algorithm"] == name) for name in ALGORITHMS})


if __name__ == "__main__":
    main()
