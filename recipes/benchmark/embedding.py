"""Dynamic tables against static ones on a CPU: lookup + backward + update, evaluation lookup, growth.

    python -m grzoo.recipes.benchmark.embedding --quick

Contestants, interleaved round by round with the same ids, gradients and threads; each does a whole training step of the
kind its users write: look up 100,000 ids (Zipf over 1M rows of width 64), back-propagate a gradient, update, zero_grad.
    grzoo          DynamicEmbeddingCollection + SparseRowwiseAdagrad / SparseAdam (growth and counters on, any int64 id)
    nn_embedding   nn.Embedding(sparse=True) + torch.optim.Adagrad (element-wise) / SparseAdam
    unique_rows    written by hand in torch: unique, index_select, index_add_, update of the unique rows
    fbgemm         one table of fbgemm_gpu's SplitTableBatchedEmbeddingBags, one id a bag, exact row-wise Adagrad; where
                   fbgemm_gpu is installed (it has no Adam on a CPU)
`rowwise_adagrad_vs_best_static` and `adam_vs_best_static` divide the median of the fastest baseline by grzoo's, the
lesser ratio of both exponents. `lookup_vs_index_select` does so for an evaluation lookup without gradients against
`index_select` on a static tensor. `two_threads_vs_one` is the speed of grzoo's row-wise Adagrad step with two threads
over one. Growth: an empty table of width 16 takes 100,000 new ids a step; `growth_longest_pause_ms` is its slowest one,
`growth_bytes_per_row` what it takes beyond rows and state, which are its payload.

`--quick` measures 1M rows of width 64, the full run 1M and 4M rows of width 64 and 128 (it needs 20 GB) and growth to
50M; the figures of the last line are those of the first size. The CSV names threads and the settings of the allocator.

Times are wall times; on a machine that is shared `--clock cpu` counts the time of this process alone (one thread only).
"""

import argparse
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseAdam, SparseRowwiseAdagrad, TableConfig
from grzoo.embeddings.kernels import RowInit, Slot, get_backend
from torch import Tensor, nn

from .reporting import print_headline, spread, write_rows

LEARNING_RATE, EPS = 0.01, 1e-8
BETAS = (0.9, 0.999)
Step = Callable[[Tensor, Tensor], Any]


# ---- workload ----


def zipf_batches(rows: int, count: int, exponent: float, batches: int) -> list[Tensor]:
    """Draw batches of ids int64 [count] in [0, rows), popularity ~ rank^-exponent, ranks shuffled over the ids."""
    generator = np.random.default_rng(0)
    cumulative = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -exponent)
    shuffled = generator.permutation(rows)
    draws = generator.random((batches, count)) * cumulative[-1]
    return [torch.from_numpy(shuffled[np.searchsorted(cumulative, draw)]) for draw in draws]


# ---- contestants: a training step on (ids [n], gradient [n, dim]) ----


def grzoo_tables(rows: int, dim: int, backend: str = "auto") -> DynamicEmbeddingCollection:
    table = TableConfig(name="item", embedding_dim=dim, initializer={"kind": "uniform", "scale": 0.05})
    return DynamicEmbeddingCollection([table], [FeatureConfig(name="ids", table="item")], backend=backend)


def grzoo_step(rows: int, dim: int, rule: str) -> tuple[Step, DynamicEmbeddingCollection]:
    tables = grzoo_tables(rows, dim)
    optimizer: torch.optim.Optimizer
    if rule == "adam":
        optimizer = SparseAdam(tables, lr=LEARNING_RATE, betas=BETAS, eps=EPS)
    else:
        optimizer = SparseRowwiseAdagrad(tables, lr=LEARNING_RATE, eps=EPS)
    for ids in torch.arange(rows).split(100_000):
        tables.prepare([{"ids": ids}])

    def step(ids: Tensor, grad: Tensor) -> None:
        tables({"ids": ids})["ids"].backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step, tables


def nn_embedding_step(rows: int, dim: int, rule: str) -> Step:
    table = nn.Embedding(rows, dim, sparse=True)
    optimizer: torch.optim.Optimizer
    if rule == "adam":
        optimizer = torch.optim.SparseAdam(table.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPS)
    else:
        optimizer = torch.optim.Adagrad(table.parameters(), lr=LEARNING_RATE, eps=EPS)

    def step(ids: Tensor, grad: Tensor) -> None:
        table(ids).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def unique_rows_step(rows: int, dim: int, rule: str) -> Step:
    weight = torch.randn(rows, dim) * 0.05
    state = [torch.zeros(rows, dim), torch.zeros(rows, dim)] if rule == "adam" else [torch.zeros(rows, 1)]
    clock = 0

    def update(unique: Tensor, p: Tensor, g: Tensor) -> None:
        if rule == "adam":
            m = state[0][unique].lerp_(g, 1 - BETAS[0])
            v = state[1][unique].mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            state[0][unique], state[1][unique] = m, v
            root = v.sqrt_().div_((1 - BETAS[1] ** clock) ** 0.5).add_(EPS)
            weight[unique] = p.addcdiv_(m, root, value=-LEARNING_RATE / (1 - BETAS[0] ** clock))
        else:
            total = state[0][unique].add_(g.square().mean(1, keepdim=True))
            state[0][unique] = total
            weight[unique] = p.addcdiv_(g, total.sqrt().add_(EPS).expand_as(g), value=-LEARNING_RATE)

    def step(ids: Tensor, grad: Tensor) -> None:
        nonlocal clock
        clock += 1
        unique, inverse = torch.unique(ids, return_inverse=True)
        leaf = weight[unique].requires_grad_()
        leaf.index_select(0, inverse).backward(grad)
        assert leaf.grad is not None
        update(unique, leaf.detach(), leaf.grad)

    return step


def fbgemm_step(rows: int, dim: int, rule: str) -> Step | None:
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except ImportError:
        return None
    if rule == "adam":
        return None
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LEARNING_RATE,
        eps=EPS,
        pooling_mode=PoolingMode.SUM,
    )
    offsets: dict[int, Tensor] = {}

    def step(ids: Tensor, grad: Tensor) -> None:
        if len(ids) not in offsets:
            offsets[len(ids)] = torch.arange(len(ids) + 1)
        table(ids, offsets[len(ids)]).backward(grad)

    return step


# ---- measurements ----


def allocator() -> str:
    """Return what is set of malloc and of huge pages: they move these figures."""
    names = ("LD_PRELOAD", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "MALLOC_CONF")
    chosen = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    try:
        pages = re.findall(r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())
    except OSError:
        pages = ["unknown"]
    return " ".join([*(chosen or ["malloc of the system"]), f"huge pages {pages[0]}"])


def interleave(
    steps: dict[str, Callable[[int], Any]], rounds: int, clock: Callable[[], float], warm_up: int = 2
) -> dict[str, list[float]]:
    """Run every step once a round; return the seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(-warm_up, rounds):
        for name, step in steps.items():
            start = clock()
            step(k)
            if k >= 0:
                times[name].append(clock() - start)
    return times


def csv_rows(case: dict[str, Any], ids: int, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    ours = np.median(times["grzoo"])
    return [
        case
        | {"contestant": name, **spread(seconds)}
        | {"million_ids_per_second": round(ids / float(np.median(seconds)) / 1e6, 2)}
        | {"over_grzoo": round(float(np.median(seconds) / ours), 2), "rounds": len(seconds)}
        for name, seconds in times.items()
    ]


def with_threads(threads: int, step: Callable[[int], Any]) -> Callable[[int], None]:
    def run(k: int) -> None:
        torch.set_num_threads(threads)
        step(k)

    return run


def bind(step: Step, batches: Sequence[Tensor], grad: Tensor) -> Callable[[int], Any]:
    return lambda k: step(batches[k % len(batches)], grad)


def training(
    rule: str, rows: int, dim: int, batches: dict[float, list[Tensor]], options: argparse.Namespace
) -> Iterator[tuple[list[dict[str, Any]], dict[str, float]]]:
    """Yield CSV rows and medians (seconds by contestant) for each exponent."""
    grzoo, tables = grzoo_step(rows, dim, rule)
    steps: dict[str, Step | None] = {
        "grzoo": grzoo,
        "nn_embedding": nn_embedding_step(rows, dim, rule),
        "unique_rows": unique_rows_step(rows, dim, rule),
        "fbgemm": fbgemm_step(rows, dim, rule),
    }
    grad = torch.randn(options.ids, dim)
    for exponent, drawn in batches.items():
        bound = {
            name: with_threads(options.threads, bind(step, drawn, grad))
            for name, step in steps.items()
            if step is not None
        }
        if rule == "rowwise_adagrad" and options.threads == 1 and options.clock == "wall":
            bound["grzoo_two_threads"] = with_threads(2, bind(grzoo, drawn, grad))
        times = interleave(bound, options.rounds, CLOCKS[options.clock])
        torch.set_num_threads(options.threads)
        case = {"case": rule, "zipf": exponent, "ids": options.ids, "rows": rows, "dim": dim, "clock": options.clock}
        yield csv_rows(case, options.ids, times), {name: float(np.median(t)) for name, t in times.items()}
    tables.close()


def evaluation(
    rows: int, dim: int, batches: dict[float, list[Tensor]], options: argparse.Namespace
) -> Iterator[tuple[list[dict[str, Any]], dict[str, float]]]:
    """Yield CSV rows and medians of lookups without gradients for each exponent."""
    tables = grzoo_tables(rows, dim)
    with torch.no_grad():
        for ids in torch.arange(rows).split(100_000):
            tables.prepare([{"ids": ids}])
        tables.eval()
        static = torch.randn(rows, dim)
        for exponent, drawn in batches.items():
            steps = {
                "grzoo": bind(lambda ids, _: tables({"ids": ids})["ids"], drawn, static),
                "index_select": bind(lambda ids, _: static.index_select(0, ids), drawn, static),
            }
            times = interleave(steps, options.rounds, CLOCKS[options.clock])
            case = {"case": "lookup", "zipf": exponent, "ids": options.ids, "rows": rows, "dim": dim}
            case |= {"clock": options.clock}
            yield csv_rows(case, options.ids, times), {name: float(np.median(t)) for name, t in times.items()}
    tables.close()


def growth(total: int, options: argparse.Namespace, dim: int = 16) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Insert 100,000 new ids a step into an empty table with row-wise Adagrad's state; return CSV rows and figures."""
    clock, batch = CLOCKS[options.clock], 100_000
    storage = get_backend().create(dim, [RowInit("uniform", 1, 0.05)])
    storage.set_slots([Slot("sum", 1)])
    tables = torch.zeros(batch, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    seconds: list[float] = []
    rows, checkpoints = [], [n for n in (1_000_000, 10_000_000, 50_000_000) if n < total] + [total]
    for start in range(0, total, batch):
        ids = torch.arange(start, start + batch)
        begin = clock()
        storage.find_or_insert(tables, ids)
        seconds.append(clock() - begin)
        if start + batch not in checkpoints:
            continue
        known = [torch.randint(0, start + batch, (batch,), generator=generator) for _ in range(9)]
        finding = interleave({"grzoo": bind(lambda i, _: storage.find(tables, i), known, tables)}, 9, clock)["grzoo"]
        overhead = storage.memory_bytes() / len(storage) - 4 * (dim + 1)
        case = {"case": "growth", "zipf": "", "ids": batch, "rows": len(storage), "dim": dim, "clock": options.clock}
        since = seconds[-(start + batch) // batch :]
        rows.append(
            case
            | {"contestant": "grzoo", **spread(since)}
            | {"million_ids_per_second": round(len(storage) / sum(seconds) / 1e6, 2), "over_grzoo": 1.0}
            | {"rounds": len(seconds), "longest_ms": round(max(seconds) * 1e3, 2)}
            | {"overhead_bytes_per_row": round(overhead, 1)}
            | {"find_ns_per_id": round(float(np.median(finding)) / batch * 1e9, 1)}
        )
    figures = {
        "growth_rows": len(storage),
        "growth_median_step_ms": round(float(np.median(seconds)) * 1e3, 2),
        "growth_longest_pause_ms": round(max(seconds) * 1e3, 2),
        "growth_bytes_per_row": rows[-1]["overhead_bytes_per_row"],
        "growth_find_ns_per_id": rows[-1]["find_ns_per_id"],
    }
    storage.close()
    return rows, figures


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def ratio(measured: list[dict[str, float]], baselines: Sequence[str]) -> float:
    """Return the least over the cases of (fastest baseline / grzoo)."""
    return round(min(min(m[b] for b in baselines if b in m) / m["grzoo"] for m in measured), 2)


def one_size(
    rows: int, dim: int, batches: dict[float, list[Tensor]], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the CSV rows and the figures of training and evaluation with tables of one size."""
    baselines = ("nn_embedding", "unique_rows", "fbgemm")
    figures: dict[str, float] = {}
    found: list[dict[str, Any]] = []
    for rule in ("rowwise_adagrad", "adam"):
        measured = []
        for new, medians in training(rule, rows, dim, batches, options):
            found += new
            measured.append(medians)
        figures[f"{rule}_vs_best_static"] = ratio(measured, baselines)
        if all("grzoo_two_threads" in m for m in measured):
            figures["two_threads_vs_one"] = round(min(m["grzoo"] / m["grzoo_two_threads"] for m in measured), 2)
    measured = []
    for new, medians in evaluation(rows, dim, batches, options):
        found += new
        measured.append(medians)
    return found, figures | {"lookup_vs_index_select": ratio(measured, ("index_select",))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: few rounds, growth to 1M rows")
    parser.add_argument("--rows", type=int, nargs="+", default=None)
    parser.add_argument("--dim", type=int, nargs="+", default=None)
    parser.add_argument("--ids", type=int, default=100_000, help="ids of a batch")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--growth_rows", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, default=None, help="CSV file to append to")
    options = parser.parse_args()
    options.rounds = options.rounds or (7 if options.quick else 50)
    growth_rows = options.growth_rows or (1_000_000 if options.quick else 50_000_000)
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for count in options.rows or ([1_000_000] if options.quick else [1_000_000, 4_000_000]):
        batches = {e: zipf_batches(count, options.ids, e, min(options.rounds, 10)) for e in (1.05, 1.2)}
        for dim in options.dim or ([64] if options.quick else [64, 128]):
            new, found = one_size(count, dim, batches, options)
            rows += new
            figures = figures or found
    grown, growth_figures = growth(growth_rows, options)
    blank = {"longest_ms": "", "overhead_bytes_per_row": "", "find_ns_per_id": ""}
    settings = {"allocator": allocator()}
    write_rows([row | blank | settings for row in rows] + [row | settings for row in grown], options.output)
    print_headline(figures | growth_figures | {"threads": options.threads, "clock": options.clock})


if __name__ == "__main__":
    main()
