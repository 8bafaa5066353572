"""The loader alone: events per second from a warm page cache, beside memcpy, and memory as the data grows.

    python -m grzoo.recipes.benchmark.loader --quick

A log of random lengths (log-normal, cut at 4,096) and two int64 columns, item_id and timestamp, is written as a dataset
folder. Then, in random batches of `users` rows, for a mean length of 600 and of 54:
    memcpy       16 bytes per event copied within memory, into one buffer that is used again
    rows         EventDataset.rows: the gather out of the mapped file alone
    workers = 0  StepLoader in this process: all fields of a micro-batch (labels, positions, keys, ...)
    workers = 1  the same steps from one worker process
An event counts once, whatever fields are made of it. `share` is events/s over that of memcpy in the same round; rounds
are interleaved, figures are medians. Memory is that of a fresh process after 40 steps with one worker: `anonymous_mib`
is its own, `mapped_mib` what it has mapped of the file, whose pages all processes of a machine share; and of 8 fresh
processes that have read every event, the sum of their proportional shares beside the size of the file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from grzoo.data import DatasetSchema, EventDataset, FeatureSpec, GenRecCollator, GlobalBatchSampler, StepLoader
from grzoo.data.jagged import offsets_of

from .reporting import print_headline, write_rows

LONGEST = 4096
BYTES_PER_EVENT = 16
CASES = ((600, 128), (600, 32), (54, 1024), (54, 128))  # mean length, users of a batch; the first of a mean is quoted
EVENTS_PER_SHARD = 10_000_000
RANKS = 8


def write_folder(folder: Path, events: int, mean: int) -> None:
    """Write a dataset folder of about `events` events in rows of `mean` events on average."""
    (folder / "data").mkdir(parents=True)
    shards = max(1, events // EVENTS_PER_SHARD)
    for shard in range(shards):
        generator = np.random.default_rng([events, mean, shard])
        lengths = _lengths(events // shards, mean, generator)
        offsets = pa.array(offsets_of(lengths).astype(np.int32))
        total = int(lengths.sum())
        columns = {"item_id": generator.integers(0, 1 << 40, total), "timestamp": np.arange(total) + shard}
        arrays = {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()}
        ones = pa.array(np.ones(len(lengths), dtype=np.int32))
        table = pa.table({"user_id": pa.array(np.arange(len(lengths))), **arrays, "target_from": ones})
        path = folder / "data" / f"train-{shard:05d}-of-{shards:05d}.parquet"
        pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=1 + len(lengths) // 8)
    features = (FeatureSpec(name="item_id", dtype="int64"), FeatureSpec(name="timestamp", dtype="int64"))
    DatasetSchema(name="loader benchmark", features=features, id_mapping="identity").save(folder)


def _lengths(events: int, mean: int, generator: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    drawn = generator.lognormal(0.0, 1.0, events // mean)
    for _ in range(8):  # cutting lowers the mean: scale until it is met
        lengths = np.clip(drawn, 2, LONGEST)
        drawn = drawn * (mean / lengths.mean())
    return np.clip(drawn, 2, LONGEST).astype(np.int64)


def build_loader(dataset: EventDataset, users: int, workers: int) -> StepLoader:
    """The loader that is measured: one rank, whole histories, no negatives."""
    sampler = GlobalBatchSampler(len(dataset), users, seed=1)
    return StepLoader(dataset, sampler, GenRecCollator(dataset, max_length=LONGEST), num_workers=workers)


def endless(loader: StepLoader) -> Iterator[int]:
    """Events of step after step, epoch after epoch."""
    while True:
        for step in loader:
            yield step.num_tokens + step.num_users


def compare(dataset: EventDataset, users: int, steps: int, rounds: int) -> list[dict[str, float]]:
    """Events per second of each contestant, one dict per round."""
    loaders = {f"workers = {n}": endless(build_loader(dataset, users, n)) for n in (0, 1)}
    for served in loaders.values():
        list(islice(served, 5))  # starts the worker and fills its queue
    sampler = GlobalBatchSampler(len(dataset), users, seed=2)
    batches = [sampler.batch_at(0, cursor) for _, cursor in sampler.positions(0)[:steps]]
    source, target = np.ones((2, 2 * LONGEST * users), dtype=np.int64)
    found = []
    for _ in range(rounds):
        sizes = [2 * int(dataset.lengths[rows].sum()) for rows in batches]
        began = time.perf_counter()
        for size in sizes:
            np.copyto(target[:size], source[:size])
        speeds = {"memcpy": sum(sizes) / 2 / (time.perf_counter() - began)}
        began = time.perf_counter()
        for rows in batches:
            dataset.rows(rows)
        speeds["rows"] = sum(sizes) / 2 / (time.perf_counter() - began)
        for name, served in loaders.items():
            # What was prefetched in the meantime is not counted.
            list(islice(served, 4))
            began = time.perf_counter()
            events = sum(islice(served, steps))
            speeds[name] = events / (time.perf_counter() - began)
        found.append(speeds)
    return found


def measure_speed(events: int, means: Sequence[int], steps: int, rounds: int) -> list[dict[str, Any]]:
    """CSV rows of throughput."""
    rows = []
    for mean in means:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "data"
            write_folder(folder, events, mean)
            dataset = EventDataset.from_folder(folder)
            dataset.rows(np.arange(len(dataset)))  # warms the page cache
            for users in (users for length, users in CASES if length == mean):
                found = compare(dataset, users, steps, rounds)
                for contestant in found[0]:
                    speed = float(np.median([speeds[contestant] for speeds in found]))
                    share = float(np.median([speeds[contestant] / speeds["memcpy"] for speeds in found]))
                    about = {"measured": "speed", "mean_length": mean, "events": events, "users": users}
                    rows.append(about | {"contestant": contestant, "value": round(speed), "share": round(share, 4)})
    return rows


def memory_of_this_process() -> dict[str, float]:
    """Own, mapped and proportional resident memory in MiB (Linux)."""
    fields: dict[str, float] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, kib = line.split()[:2]
        fields[name.rstrip(":")] = int(kib) / 1024
    mapped = fields["Rss"] - fields["Anonymous"]
    return {"anonymous_mib": fields["Anonymous"], "mapped_mib": mapped, "proportional_mib": fields["Pss"]}


def _child(folder: str, job: str) -> None:
    """A fresh process: does its job on the folder, says so, and tells its memory when asked."""
    dataset = EventDataset.from_folder(folder)
    if job == "train":
        list(islice(endless(build_loader(dataset, 128, 1)), 40))
    else:
        for first in range(0, len(dataset), 4096):
            dataset.rows(np.arange(first, min(first + 4096, len(dataset))))
    print("ready", flush=True)
    sys.stdin.readline()
    after = memory_of_this_process()
    print(json.dumps(after), flush=True)
    sys.stdin.readline()  # until the others have looked too: who leaves changes their shares


def processes_memory(folder: Path, job: str, count: int) -> list[dict[str, float]]:
    """Memory of `count` fresh processes that exist at the same time, each after its job."""
    # The module runs again in each of them.
    command = [sys.executable, "-m", "grzoo.recipes.benchmark.loader", "--child", str(folder), job]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children: list[subprocess.Popen[str]] = [subprocess.Popen(command, **pipes) for _ in range(count)]  # type: ignore[call-overload]
    for child in children:
        assert child.stdout is not None and child.stdout.readline().strip() == "ready"
    found = []
    for child in children:  # all of them are still there while each looks at its memory
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        found.append(json.loads(child.stdout.readline()))
    for child in children:
        child.communicate("\n")
    return found


def measure_memory(sizes: Sequence[int], mean: int = 600) -> list[dict[str, Any]]:
    """CSV rows of memory, one data set per number of events."""
    rows = []
    for events in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "data"
            write_folder(folder, events, mean)
            EventDataset.from_folder(folder)  # makes the mapped file
            size = sum(path.stat().st_size for path in (folder / ".cache").glob("*.arrow*")) / 2**20
            (trained,) = processes_memory(folder, "train", 1)
            together = processes_memory(folder, "read", RANKS)
            figures = {key: trained[key] for key in ("anonymous_mib", "mapped_mib")}
            figures |= {"file_mib": size}
            figures[f"{RANKS}_ranks_mib"] = sum(child["proportional_mib"] for child in together)
            figures[f"{RANKS}_ranks_anonymous_mib"] = sum(child["anonymous_mib"] for child in together)
            about = {"measured": "memory", "mean_length": mean, "events": events, "users": 128}
            rows += [about | {"contestant": k, "value": round(v, 1), "share": ""} for k, v in figures.items()]
    return rows


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The headline figures by name."""
    figures: dict[str, Any] = {}
    for row in rows:
        if row["measured"] == "memory":
            figures[f"{row['contestant']}_at_{row['events']}"] = row["value"]
        elif (row["mean_length"], row["users"]) in (CASES[0], CASES[2]):
            name = row["contestant"].replace(" = ", "_")
            figures[f"events_per_second_{name}_mean_{row['mean_length']}"] = row["value"]
            if row["contestant"] != "memcpy":
                figures[f"share_of_memcpy_{name}_mean_{row['mean_length']}"] = row["share"]
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure throughput and memory, write rows, end with the headline figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="less data, no memory at 100 million events")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    parser.add_argument("--part", choices=("speed", "memory"), help="only this part")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "JOB"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        _child(*options.child)
        return
    events, steps, rounds = (5_000_000, 25, 3) if options.quick else (20_000_000, 60, 9)
    rows = measure_speed(events, (600, 54), steps, rounds) if options.part != "memory" else []
    if options.part != "speed" and os.path.exists("/proc/self/smaps_rollup"):
        rows += measure_memory((1_000_000,) if options.quick else (1_000_000, 100_000_000))
    write_rows(rows, options.csv)
    print_headline(headline(rows))


if __name__ == "__main__":
    main()
