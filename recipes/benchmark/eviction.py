"""Eviction under a drifting id stream: memory, lookup time, hit rate against an ideal LRU of the same size.

    python -m grzoo.recipes.benchmark.eviction --quick

Each step trains a table of width 16 (row-wise Adagrad, LRU eviction to `max_rows` every `every` steps) on ids whose
popularity falls with age, id = drift * step - r with r log-uniform (Zipf of exponent 1) over eight times `max_rows`, so
that ids are born, fade and leave for ever. A hit is a distinct id of a step that has a row when the step begins. The
ideal LRU is a Python OrderedDict of `max_rows` ids that evicts at once; the table, which grows between evictions, holds
`mean_rows` on average and may hit more often. The contestant without policies sees the first
tenth of the steps, interleaved. One CSV row per tenth of the steps; the headline compares the last with the third, when
the table has been full for a while.

Times are wall times; on a machine that is shared `--clock cpu` counts the time of this process alone.
"""

import argparse
import resource
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grzoo.embeddings import (
    DynamicEmbeddingCollection,
    FeatureConfig,
    SparseOptimizer,
    SparseRowwiseAdagrad,
    TableConfig,
)
from torch import Tensor

from .reporting import print_headline, write_rows

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
DIM = 16


def drifting_ids(step: int, *, count: int, drift: int, spread: int) -> Tensor:
    """Draw the ids int64 [count] of a step; a function of its number."""
    age = np.exp(np.random.default_rng([7, step]).random(count) * np.log(spread)).astype(np.int64)
    return torch.from_numpy(step * drift - age)


class IdealLRU:
    """The `size` ids that were used last."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._used: OrderedDict[int, None] = OrderedDict()

    def use(self, ids: list[int]) -> int:
        """Use distinct ids and return how many were there."""
        hits = sum(i in self._used for i in ids)
        for i in ids:
            self._used[i] = None
            self._used.move_to_end(i)
        while len(self._used) > self.size:
            self._used.popitem(last=False)
        return hits


def build(max_rows: int, every: int) -> tuple[DynamicEmbeddingCollection, SparseOptimizer]:
    """A table with LRU eviction (every > 0) or without policies, and its optimizer."""
    policies: dict[str, Any] = {"max_rows": max_rows, "eviction": {"kind": "lru", "every": every}} if every else {}
    tables = [TableConfig(name="item", embedding_dim=DIM, **policies)]
    collection = DynamicEmbeddingCollection(tables, [FeatureConfig(name="ids", table="item")])
    return collection, SparseRowwiseAdagrad(collection, lr=0.01)


def train(collection: DynamicEmbeddingCollection, optimizer: SparseOptimizer, ids: Tensor, grad: Tensor) -> int:
    """One training step; returns how many of its distinct ids were new."""
    step = collection.prepare([{"ids": ids}]).fetch()
    step[0]["ids"].backward(grad)
    optimizer.step()
    return step.statistics["inserted"]


def find_ns(collection: DynamicEmbeddingCollection, ids: Tensor, clock: Callable[[], float]) -> float:
    """Return the median time of an evaluation lookup of a fixed number of ids that have rows, in ns per id."""
    known = collection.ids("item")[: len(ids)].contiguous()
    seconds = []
    with torch.no_grad():
        for _ in range(9):
            begin = clock()
            collection({"ids": known}, insert=False, count=False)
            seconds.append(clock() - begin)
    return float(np.median(seconds)) / max(1, len(known)) * 1e9


def soak(
    steps: int, *, max_rows: int, every: int, count: int, drift: int, clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, Any]]:
    """Train for `steps` steps; return a row of figures for each tenth of them."""
    (evicting, optimizer), (plain, other), ideal = build(max_rows, every), build(max_rows, 0), IdealLRU(max_rows)
    grad = torch.randn(count, DIM, generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    for tenth in range(10):
        times: dict[str, list[float]] = {"step": [], "evicting": [], "plain": []}
        seen = hits = ideal_hits = rows_held = 0
        for step in range(tenth * steps // 10, (tenth + 1) * steps // 10):
            ids = drifting_ids(step, count=count, drift=drift, spread=8 * max_rows)
            distinct = torch.unique(ids)
            ideal_hits += ideal.use(distinct.tolist())
            begin = clock()
            new = train(evicting, optimizer, ids, grad)
            times["evicting" if (step + 1) % every == 0 else "step"].append(clock() - begin)
            seen, hits, rows_held = seen + len(distinct), hits + len(distinct) - new, rows_held + evicting.num_rows()
            if tenth == 0:
                begin = clock()
                train(plain, other, ids, grad)
                times["plain"].append(clock() - begin)
        statistics = evicting.statistics()["item"]
        evicting.drain_evicted("item")
        rows.append(
            {"step": (tenth + 1) * steps // 10, "max_rows": max_rows, "every": every, "ids": count, "dim": DIM}
            | {"rows": statistics["rows"], "mean_rows": rows_held // max(1, steps // 10)}
            | {"evicted": statistics["evicted"], "new_rows": statistics["new_rows"]}
            | {"table_bytes": evicting.memory_bytes()}
            | {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
            | {"hit_rate": round(hits / seen, 4), "ideal_hit_rate": round(ideal_hits / seen, 4)}
            | {f"{name}_ms": round(float(np.median(t)) * 1e3, 3) if t else "" for name, t in times.items()}
            | {"longest_ms": round(max(times["step"] + times["evicting"]) * 1e3, 3)}
            | {"lookup_ns_per_id": round(find_ns(evicting, grad, clock), 1)}
        )
    evicting.close()
    plain.close()
    return rows


def headline(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Name what the run showed."""
    early, late = rows[2], rows[-1]
    return {
        "steps": late["step"],
        "hit_rate": late["hit_rate"],
        "mean_rows_over_max_rows": round(late["mean_rows"] / late["max_rows"], 3),
        "hit_rate_vs_ideal_lru": round(late["hit_rate"] / late["ideal_hit_rate"], 4),
        "table_bytes_growth": round(late["table_bytes"] / early["table_bytes"], 3),
        "peak_rss_growth_mb": late["peak_rss_mb"] - early["peak_rss_mb"],
        "lookup_time_growth": round(late["lookup_ns_per_id"] / early["lookup_ns_per_id"], 3),
        "step_vs_no_policy": round(rows[0]["step_ms"] / rows[0]["plain_ms"], 3),
        "eviction_step_ms": late["evicting_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: 1,000 steps")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--max_rows", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--ids", type=int, default=4096, help="ids of a step")
    parser.add_argument("--drift", type=int, default=200, help="new ids a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, default=None, help="CSV file to append to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = options.steps or (1_000 if options.quick else 10_000)
    shape = {"max_rows": options.max_rows, "every": options.every, "count": options.ids, "drift": options.drift}
    rows = soak(steps, **shape, clock=CLOCKS[options.clock])
    write_rows([row | {"clock": options.clock} for row in rows], options.output)
    print_headline(headline(rows) | {"clock": options.clock})


if __name__ == "__main__":
    main()
