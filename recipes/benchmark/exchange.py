"""What the exchange of sharded tables sends and looks up: with no, one and two dedups, per micro-batch and per step.

    python -m grzoo.recipes.benchmark.exchange --quick

Ids: "zipf-E" (exponent E over a million ids), and with --source the item ids of MovieLens-1M (SOURCE/ml-1m, users drawn
at random, their last 200 items) and the 26 fields of Criteo (SOURCE/criteo-80k, rows drawn at random, a table for each
field). Each rank holds an equal part of a global step of `--samples` samples, in `--micro_batches` micro-batches.

Ways to exchange them, a row of the CSV each; numbers are totals over ranks and the mean of the steps:
    dedup none  every occurrence is sent to its owner, looked up there, and its row and gradient travel
    dedup one   a rank sends each of its distinct ids once; the owner looks up what each rank asks
    dedup two   the owner also removes what several ranks ask: it looks each distinct id up once   (what grzoo does)
    exchange    "step": ids, rows and gradients of all micro-batches travel together   (what grzoo does);
                "micro-batch": each by itself
`id_bytes`, `row_bytes`, `gradient_bytes` leave a rank for another one; `rows_looked_up` are those that owners read and
update. "two, step" and "two, micro-batch" are also run by gloo ranks that train the tables (`ranks_ran`): what
`step.statistics` counted is in the CSV (with eight bytes for each table and pair of ranks that say how many ids come),
and the run fails where it is not what was computed. The last line divides the
bytes and rows of "none" and of "two, micro-batch" by those of "two, step", at the largest number of ranks.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseRowwiseAdagrad, TableConfig
from grzoo.embeddings.hashing import owner
from torch import Tensor

from .reporting import print_headline, write_rows

DEDUPS, EXCHANGES = ("none", "one", "two"), ("step", "micro-batch")
LONGEST = 200  # items of a MovieLens user
ZIPF_IDS = 1_000_000
Batch = dict[str, Tensor]  # table -> ids int64 [n]
GlobalStep = list[list[Batch]]  # rank, micro-batch


# ---- ids ----


class Zipf:
    """Samples of 50 ids, popularity ~ rank^-exponent."""

    length = 50

    def __init__(self, exponent: float) -> None:
        self.tables = ["item"]
        weights = np.arange(1, ZIPF_IDS + 1, dtype=np.float64) ** -exponent
        self._cumulative = np.cumsum(weights) / weights.sum()

    def draw(self, samples: int, generator: np.random.Generator) -> Batch:
        return {"item": torch.from_numpy(np.searchsorted(self._cumulative, generator.random(samples * self.length)))}


class MovieLens:
    """The last items of users of MovieLens-1M."""

    def __init__(self, folder: Path) -> None:
        self.tables = ["item"]
        users, items = np.loadtxt(folder / "ml-1m.txt", dtype=np.int64).T
        order = np.argsort(users, kind="stable")
        edges = np.flatnonzero(np.diff(users[order])) + 1
        self._histories = [history[-LONGEST:] for history in np.split(items[order], edges)]

    def draw(self, samples: int, generator: np.random.Generator) -> Batch:
        drawn = [self._histories[u] for u in generator.integers(len(self._histories), size=samples)]
        return {"item": torch.from_numpy(np.concatenate([np.empty(0, np.int64), *drawn]))}


class Criteo:
    """Rows of Criteo: at most one id in each of 26 fields."""

    def __init__(self, folder: Path) -> None:
        from pyarrow import concat_tables, orc

        self.tables = [f"c{k}" for k in range(1, 27)]
        files = sorted(folder.glob("part-*.orc"))
        if not files:
            raise FileNotFoundError(f"{folder} holds no part-*.orc")
        rows = concat_tables([orc.ORCFile(file).read(columns=self.tables) for file in files])
        self._fields = {name: [np.asarray(ids, np.int64) for ids in rows[name].to_pylist()] for name in self.tables}
        self._count = len(rows)

    def draw(self, samples: int, generator: np.random.Generator) -> Batch:
        rows = generator.integers(self._count, size=samples)
        return {
            name: torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(ids[row] for row in rows)]))
            for name, ids in self._fields.items()
        }


Log = Zipf | MovieLens | Criteo


def global_steps(log: Log, settings: "Settings", world_size: int) -> list[GlobalStep]:
    """Draw the steps; the samples of a step are the same for any number of ranks and micro-batches."""
    drawn: list[GlobalStep] = []
    for number in range(settings.steps):
        generator = np.random.default_rng([11, number])
        samples = [log.draw(1, generator) for _ in range(settings.samples)]
        bins = world_size * settings.micro_batches
        parts = [_join(samples[b::bins], log.tables) for b in range(bins)]
        drawn.append([parts[r * settings.micro_batches : (r + 1) * settings.micro_batches] for r in range(world_size)])
    return drawn


def _join(batches: Sequence[Batch], tables: Sequence[str]) -> Batch:
    none = torch.empty(0, dtype=torch.int64)
    return {table: torch.cat([none, *(batch[table] for batch in batches)]) for table in tables}


# ---- what is sent, computed ----


@dataclass(frozen=True)
class Settings:
    """The size of a run."""

    samples: int
    micro_batches: int
    steps: int
    dim: int


def traffic(step: GlobalStep, tables: Sequence[str], dim: int, dedup: str, exchange: str) -> dict[str, int]:
    """Count what one optimizer step sends and looks up, over all ranks."""
    rounds = [step] if exchange == "step" else [[[micro] for micro in by_rank] for by_rank in zip(*step, strict=True)]
    counts = {"ids": 0, "ids_sent": 0, "rows_looked_up": 0}
    for ranks in rounds:
        for table in tables:
            asked = [torch.cat([micro[table] for micro in micros]) for micros in ranks]
            counts["ids"] += sum(map(len, asked))
            if dedup != "none":
                asked = [torch.unique(ids) for ids in asked]
            arrived = torch.cat(asked)
            counts["ids_sent"] += sum(int((owner(ids, len(ranks)) != r).sum()) for r, ids in enumerate(asked))
            counts["rows_looked_up"] += len(torch.unique(arrived)) if dedup == "two" else len(arrived)
    sent = counts["ids_sent"]
    return counts | {"id_bytes": 8 * sent, "row_bytes": 4 * dim * sent, "gradient_bytes": 4 * dim * sent}


# ---- what is sent, by ranks that train ----


def train(
    steps: Sequence[list[Batch]], tables: Sequence[str], dim: int, exchange: str, group: dist.ProcessGroup | None
) -> dict[str, int]:
    """Train on this rank's micro-batches of each step; return what `step.statistics` counted, summed over the steps."""
    collection = DynamicEmbeddingCollection(
        [TableConfig(name=name, embedding_dim=dim) for name in tables],
        [FeatureConfig(name=name, table=name) for name in tables],
        process_group=group,
    )
    optimizer = SparseRowwiseAdagrad(collection, lr=0.01)
    total = {"bytes_sent": 0, "unique_owned": 0}
    for micro_batches in steps:
        rounds: list[list[Batch]] = [micro_batches] if exchange == "step" else [[micro] for micro in micro_batches]
        prepared = [collection.prepare(batches).fetch() for batches in rounds]
        for step in prepared:
            for k in range(len(step)):
                sum((rows.sum() for rows in step[k].values()), torch.zeros(())).backward()
        optimizer.step()
        for step in prepared:
            for name in total:
                total[name] += step.statistics[name]
    collection.close()
    return total


@dataclass(frozen=True)
class Job:
    """The ids of a log, dealt to ranks. Each process draws them for itself."""

    log: Log
    settings: Settings
    world_size: int

    def steps(self) -> list[GlobalStep]:
        return global_steps(self.log, self.settings, self.world_size)

    def run(self, rank: int, group: dist.ProcessGroup | None) -> dict[str, dict[str, int]]:
        """Train as one rank; return what it counted for each kind of exchange."""
        mine, tables, dim = [step[rank] for step in self.steps()], self.log.tables, self.settings.dim
        return {exchange: train(mine, tables, dim, exchange, group) for exchange in EXCHANGES}


def run_rank(rank: int, world_size: int, folder: str, jobs: Mapping[str, Job]) -> None:
    """A process of its own: run all jobs and write what they counted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    found = {name: job.run(rank, dist.group.WORLD) for name, job in jobs.items()}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run_ranks(jobs: Mapping[str, Job], world_size: int) -> dict[str, dict[str, dict[str, int]]]:
    """Train on gloo ranks; return for each job and kind of exchange what all of them counted."""
    if world_size == 1:
        found = [{name: job.run(0, None) for name, job in jobs.items()}]
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_rank, args=(world_size, folder, jobs), nprocs=world_size)
            found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]
    return {
        name: {e: {key: sum(rank[name][e][key] for rank in found) for key in found[0][name][e]} for e in EXCHANGES}
        for name in jobs
    }


def check(computed: Mapping[str, float], counted: Mapping[str, int], header: int) -> None:
    """Raise RuntimeError where ranks did not send or look up what was computed, totals of all steps."""
    sent = computed["id_bytes"] + computed["row_bytes"] + computed["gradient_bytes"] + header
    if counted["unique_owned"] != computed["rows_looked_up"] or counted["bytes_sent"] != sent:
        raise RuntimeError(
            f"ranks counted {dict(counted)}, computed were {sent} bytes, {computed['rows_looked_up']} rows"
        )


def header_bytes(world_size: int, tables: int, rounds: int) -> int:
    """Bytes of the counts that go before the ids: a word for each table and a flag, between all pairs of ranks."""
    return 8 * world_size * (world_size - 1) * (1 + tables) * rounds


# ---- the run ----


def measure(logs: Mapping[str, Log], world_size: int, settings: Settings, *, with_ranks: bool) -> list[dict[str, Any]]:
    """Return a row for each log and way to exchange its ids over so many ranks."""
    jobs = {name: Job(log, settings, world_size) for name, log in logs.items()}
    counted = run_ranks(jobs, world_size) if with_ranks else {}
    return [row for name, job in jobs.items() for row in _rows(name, job, counted.get(name, {}))]


def _rows(name: str, job: Job, counted: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    settings, world_size, tables, steps = job.settings, job.world_size, job.log.tables, job.steps()
    rows = []
    for exchange in EXCHANGES:
        for dedup in DEDUPS:
            found = [traffic(step, tables, settings.dim, dedup, exchange) for step in steps]
            total = {key: sum(f[key] for f in found) for key in found[0]}
            ran = dedup == "two" and exchange in counted
            if ran:
                rounds = settings.steps * (1 if exchange == "step" else settings.micro_batches)
                check(total, counted[exchange], header_bytes(world_size, len(tables), rounds))
            mean = {key: value / settings.steps for key, value in total.items()}
            rows.append(
                {"ids_of": name, "ranks": world_size, "dedup": dedup, "exchange": exchange}
                | {"samples": settings.samples, "micro_batches": settings.micro_batches, "dim": settings.dim}
                | {key: round(value, 1) for key, value in mean.items()}
                | {"bytes": round(sum(v for k, v in mean.items() if k.endswith("bytes")), 1), "ranks_ran": ran}
                | {"bytes_counted": round(counted[exchange]["bytes_sent"] / settings.steps, 1) if ran else ""}
            )
    return rows


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Name, for each log at the most ranks, what dedup and the exchange per step save."""
    most = max(row["ranks"] for row in rows)
    figures: dict[str, Any] = {"ranks": most}
    for name in dict.fromkeys(row["ids_of"] for row in rows):
        at = {(row["dedup"], row["exchange"]): row for row in rows if row["ids_of"] == name and row["ranks"] == most}
        ours, plain, per_micro = at["two", "step"], at["none", "step"], at["two", "micro-batch"]
        figures[f"{name}_bytes_saved_by_dedup"] = round(plain["bytes"] / max(1, ours["bytes"]), 2)
        figures[f"{name}_rows_saved_by_dedup"] = round(plain["rows_looked_up"] / ours["rows_looked_up"], 2)
        figures[f"{name}_bytes_saved_by_step"] = round(per_micro["bytes"] / max(1, ours["bytes"]), 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: one step, ranks run up to two")
    parser.add_argument("--source", type=Path, default=os.environ.get("GRZOO_DATA"), help="folder of ml-1m, criteo-80k")
    parser.add_argument("--samples", type=int, default=256, help="of a global step")
    parser.add_argument("--micro_batches", type=int, default=4, help="of a rank and step")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=None, help="CSV file to append to")
    options = parser.parse_args()
    settings = Settings(
        options.samples, options.micro_batches, options.steps or (1 if options.quick else 5), options.dim
    )
    logs: dict[str, Log] = {"zipf-1.05": Zipf(1.05), "zipf-1.2": Zipf(1.2)}
    if options.source is not None:
        logs |= {"ml-1m": MovieLens(options.source / "ml-1m"), "criteo": Criteo(options.source / "criteo-80k")}
    else:
        print("no --source and no GRZOO_DATA: Zipf ids alone", flush=True)
    rows: list[dict[str, Any]] = []
    for world_size in options.ranks:
        rows += measure(logs, world_size, settings, with_ranks=not options.quick or world_size <= 2)
    write_rows(rows, options.output)
    print_headline(headline(rows))


if __name__ == "__main__":
    main()
