"""Preparation of an event log: grouped in memory against out of core, in time and in memory.

    python -m grzoo.recipes.benchmark.preparation --quick

A log of random events (users and items by Zipf's law, times in random order, one numeric feature) is written as
Parquet, larger in memory than the limit of the out-of-core path. A fresh process prepares it by each path:
    in memory    the whole log as Arrow and NumPy arrays
    out of core  DuckDB's external sort within --max_memory_gb
`own_mib` is the most memory of its own that the process held (mapped files, whose pages the system can take back, are
not counted; a process that has imported grzoo and done nothing holds `idle_mib`), `log_mib` what the log takes as
arrays. `same` says whether both folders hold the same bytes.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from grzoo.data.prepare import prepare

from .reporting import print_headline, write_rows

MEMORY_GB = 0.6
CHUNK = 2_000_000
BYTES_PER_EVENT = 4 * 8  # user, item, time, feature
PATHS = {"in memory": None, "out of core": MEMORY_GB}


def write_log(path: Path, events: int) -> None:
    """Write a log of `events` events, about 100 a user."""
    writer: pq.ParquetWriter | None = None
    for chunk, first in enumerate(range(0, events, CHUNK)):
        generator = np.random.default_rng(chunk)
        size = min(CHUNK, events - first)
        users = events // 100
        table = pa.table(
            {
                "user_id": (users * generator.random(size) ** 2).astype(np.int64),
                "item_id": np.minimum(generator.zipf(1.2, size), 1_000_000),
                "time": generator.integers(1_600_000_000, 1_700_000_000, size),
                "rating": generator.integers(1, 6, size),
            }
        )
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def own_memory() -> float:
    """MiB of this process that no file backs (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def _child(log: str, output: str, memory: str) -> None:
    """A fresh process: prepares the log and prints seconds and the most memory it held."""
    idle = peak = own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    options = {"timestamp_column": "time", "feature_columns": ["rating"]}
    limit = None if memory == "None" else float(memory)
    prepare("event_log", output, log, max_memory_gb=limit, **options)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "own_mib": peak, "idle_mib": idle}))


def prepare_in_process(log: Path, output: Path, memory: float | None) -> dict[str, float]:
    """What a fresh process says of one preparation."""
    command = [sys.executable, "-m", "grzoo.recipes.benchmark.preparation", "--child", str(log), str(output)]
    done = subprocess.run([*command, str(memory)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def digest(folder: Path) -> str:
    """A hash of all files of a folder."""
    state = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        state.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return state.hexdigest()


def measure(events: int) -> list[dict[str, Any]]:
    """CSV rows, one per path."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log.parquet"
        write_log(log, events)
        outputs = {path: Path(name) / path.replace(" ", "-") for path in PATHS}
        found = {path: prepare_in_process(log, outputs[path], memory) for path, memory in PATHS.items()}
        same = len({digest(output) for output in outputs.values()}) == 1
    rows = []
    for path, one in found.items():
        about: dict[str, Any] = {"events": events, "log_mib": round(events * BYTES_PER_EVENT / 2**20), "path": path}
        about |= {"limit_mib": round((PATHS[path] or 0) * 1e9 / 2**20) or "", "seconds": round(one["seconds"], 2)}
        about |= {"events_per_second": round(events / one["seconds"]), "same": same}
        rows.append(about | {key: round(one[key]) for key in ("own_mib", "idle_mib")})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write rows, end with the headline figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="4 million events instead of 40")
    parser.add_argument("--events", type=int, default=None, help="size of the log")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    parser.add_argument("--child", nargs=3, metavar=("LOG", "OUTPUT", "MEMORY"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        _child(*options.child)
        return
    rows = measure(options.events or (4_000_000 if options.quick else 40_000_000))
    write_rows(rows, options.csv)
    inside, outside = rows
    figures: dict[str, Any] = {"time_vs_in_memory": round(outside["seconds"] / inside["seconds"], 2)}
    figures |= {"own_mib": outside["own_mib"], "limit_mib": outside["limit_mib"], "log_mib": outside["log_mib"]}
    print_headline(figures | {"own_mib_in_memory": inside["own_mib"], "same": outside["same"]})


if __name__ == "__main__":
    main()
