"""Training HSTU on long-tailed histories on two ranks: random batches of fixed size per rank against balanced ones.

    GRZOO_DATA=FOLDER python -m grzoo.recipes.benchmark.balanced_training --quick

Two processes (gloo, one thread each) train through the DeepSpeed engine of the recipes. Every contestant has an engine
of its own, begun alike, and all train the same global batches, taking turns at every step:
    random    as many users for each rank, in the random order of the batch
    balanced  equal cost, by the model's FLOPs
    measured  equal cost, by the time of samples of some lengths, measured beforehand
`ratio` is tokens per second over those of `random`, all steps together, and `p10`, `p90` of the single steps;
`cpu_ratio` is the same of the CPU time of the slower rank of each step, which other work on the machine changes little;
`expected` is the ratio if time were the FLOPs of the model (`balanced`) or the measured cost (`measured`);
`loss_difference` the largest relative difference of a step's loss from that of `random`: they differ by rounding only.
Batches are made beforehand; the time is that of the engine's step.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from grzoo.data import EventDataset, GenRecCollator, GlobalStep, UniformNegatives
from grzoo.data.balancing import Cost, MicroBatchPlan, bin_costs, plan_micro_batches
from grzoo.embeddings import SparseAdamW
from grzoo.models import HSTUConfig, HSTUForRetrieval
from grzoo.recipes.calibration import measure

from .balancing_cases import Int64, movielens_events, plan_random, zipf_lengths
from .reporting import print_headline, write_rows

RANKS = 2
ITEMS = 3_416
NEGATIVES = 128
CONTESTANTS = ("random", "balanced", "measured")


@dataclass(frozen=True)
class Workload:
    """Histories of `lengths` (inputs, int64 [users]) in global batches of `users` users."""

    name: str
    lengths: Int64
    users: int
    steps: int

    @property
    def longest(self) -> int:
        """Inputs of the longest history."""
        return int(self.lengths.max())


def workloads(quick: bool) -> list[Workload]:
    """Zipf lengths, and MovieLens-1M's where $GRZOO_DATA holds it."""
    steps, longest = (4, 512) if quick else (24, 2048)
    found = [Workload(f"zipf <= {longest:,}", np.minimum(zipf_lengths(20_000), longest), 16, steps)]
    events = movielens_events("ml-1m")
    if events is not None:
        longest = min(longest, 1024)
        found.append(Workload(f"ml-1m <= {longest:,}", np.minimum(events - 1, longest), 32, steps))
    return found


def build_dataset(workload: Workload) -> EventDataset:
    """The histories that the steps need, of random items."""
    generator = np.random.default_rng(1)
    lengths = generator.choice(workload.lengths, workload.users * (workload.steps + 1)) + 1
    total = int(lengths.sum())
    columns = {"item_id": generator.integers(1, ITEMS + 1, total), "timestamp": np.arange(total) * 60}
    return EventDataset.from_arrays(columns, lengths)


def collator_of(dataset: EventDataset, longest: int) -> GenRecCollator:
    """Whole histories with uniform negatives."""
    negatives = UniformNegatives(np.arange(1, ITEMS + 1), NEGATIVES)
    return GenRecCollator(dataset, max_length=longest, seed=0, negatives=negatives)


def build_model(longest: int) -> HSTUForRetrieval:
    """HSTU in the paper's size for MovieLens-1M, equal whenever it is built."""
    torch.manual_seed(0)
    config = HSTUConfig(max_sequence_length=longest, max_position_embeddings=longest + 11, num_negatives=NEGATIVES)
    return HSTUForRetrieval(config)


def build_engine(longest: int) -> Any:
    """A new model in the engine of the recipes."""
    from grzoo.embeddings.engine import initialize

    config = {
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }
    model = build_model(longest)
    engine, _, _, _ = initialize(
        model=model, config=config, sparse_optimizer=lambda collection: SparseAdamW(collection, 1e-3)
    )
    return engine


def step_of(collator: GenRecCollator, rows: Int64, number: int, rank: int, plan: MicroBatchPlan) -> GlobalStep:
    """The rank's share of the global batch `rows` under a plan."""
    samples = collator.samples(rows)
    batch = collator.micro_batch(samples[plan.members(0, rank)], number)
    items = collator.num_items(samples)
    return GlobalStep(number, 0, 0, [batch], items, len(rows), int(samples.num_inputs.sum()))


def rank_main(rank: int, quick: bool, folder: str, environment: dict[str, str]) -> None:
    """One rank: all workloads; rank 0 leaves the rows in `folder`."""
    import os

    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    rows = [row for workload in workloads(quick) for row in train(workload, rank)]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def train(workload: Workload, rank: int) -> list[dict[str, Any]]:
    """CSV rows of a workload, one per contestant."""
    dataset = build_dataset(workload)
    collator = collator_of(dataset, workload.longest)
    costs = {"balanced": build_model(workload.longest).flops, "measured": _agreed_cost(workload, rank)}
    engines = {name: build_engine(workload.longest) for name in CONTESTANTS}
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    losses: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    slowest: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    tokens = []
    for number in range(workload.steps + 1):  # the first step warms up
        rows = np.arange(number * workload.users, (number + 1) * workload.users)
        lengths = collator.samples(rows).num_inputs
        plans = {"random": plan_random(lengths, RANKS, 1)}
        plans |= {name: plan_micro_batches(cost(lengths), lengths, RANKS) for name, cost in costs.items()}
        tokens.append(int(lengths.sum()))
        turn = [CONTESTANTS[(number + k) % len(CONTESTANTS)] for k in range(len(CONTESTANTS))]
        for name in turn:
            step = step_of(collator, rows, number, rank, plans[name])
            dist.barrier()
            began, cpu_began = time.perf_counter(), time.process_time()
            output = engines[name].train_batch(step)
            spent = torch.tensor(time.process_time() - cpu_began, dtype=torch.float64)
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(float(spent))
            losses[name].append(output.loss)
            slowest[name].append({key: _slowest(cost, lengths, plans[name]) for key, cost in costs.items()})
    for engine in engines.values():
        engine.destroy()
    return [_row(workload, name, seconds, cpu_seconds, losses, slowest, tokens) for name in CONTESTANTS]


def _agreed_cost(workload: Workload, rank: int) -> Cost:
    """The cost that rank 0 measures while the other waits."""
    agreed: list[Any] = [None]
    if rank == 0:
        items = np.arange(1, ITEMS + 1)
        longest = workload.longest
        agreed = [measure(build_model(longest), lambda dataset: collator_of(dataset, longest), items, longest)]
    dist.broadcast_object_list(agreed)
    return agreed[0]


def _slowest(cost: Cost, lengths: Int64, plan: MicroBatchPlan) -> float:
    return float(bin_costs(cost(lengths), plan.rank, RANKS).max())


def _row(
    workload: Workload,
    name: str,
    seconds: dict[str, list[float]],
    cpu_seconds: dict[str, list[float]],
    losses: dict[str, list[float]],
    slowest: dict[str, list[dict[str, float]]],
    tokens: list[int],
) -> dict[str, Any]:
    mine, random = np.array(seconds[name][1:]), np.array(seconds["random"][1:])
    low, high = np.percentile(random / mine, [10, 90])
    by = "measured" if name == "measured" else "balanced"
    expected = sum(x[by] for x in slowest["random"][1:]) / sum(x[by] for x in slowest[name][1:])
    reference, found = np.array(losses["random"]), np.array(losses[name])
    return {
        "workload": workload.name,
        "ranks": RANKS,
        "users": workload.users,
        "steps": workload.steps,
        "mean_tokens": round(float(np.mean(tokens[1:]))),
        "contestant": name,
        "median_ms": round(float(np.median(mine)) * 1e3, 1),
        "tokens_per_second": round(sum(tokens[1:]) / mine.sum()),
        "ratio": round(float(random.sum() / mine.sum()), 4),
        "p10": round(float(low), 4),
        "p90": round(float(high), 4),
        "cpu_ratio": round(sum(cpu_seconds["random"][1:]) / sum(cpu_seconds[name][1:]), 4),
        "expected": round(expected, 4),
        "loss_difference": float(f"{np.abs(found / reference - 1).max():.2g}"),
    }


def run(quick: bool) -> list[dict[str, Any]]:
    """CSV rows of all workloads, from two fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
        environment |= {"LOCAL_WORLD_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu"}
        mp.spawn(rank_main, (quick, folder, environment), nprocs=RANKS)
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text())
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write rows, end with the headline figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter steps: under a minute")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    options = parser.parse_args(arguments)
    rows = run(options.quick)
    write_rows(rows, options.csv)
    figures: dict[str, Any] = {}
    for name in ("balanced", "measured"):
        figures[f"{name}_vs_random"] = min(row["ratio"] for row in rows if row["contestant"] == name)
        figures[f"{name}_vs_random_cpu"] = min(row["cpu_ratio"] for row in rows if row["contestant"] == name)
    figures["loss_difference"] = max(row["loss_difference"] for row in rows)
    print_headline(figures | {"workloads": list(dict.fromkeys(row["workload"] for row in rows))})


if __name__ == "__main__":
    main()
