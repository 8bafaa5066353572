"""Saving and loading a table against copying the same bytes to and from the same disk.

    python -m grzoo.recipes.benchmark.checkpoint --quick

A table of width 64 with the state of Adam (780 bytes a row in the file; its ids are hashes) is saved as a checkpoint
has it, into a new folder and with checksums, and loaded again, all checksums compared. Baselines, in the same run and
folder, interleaved round by round:
    save   buffers in memory are written to one file of as many bytes; both end with fsync
    load   the files of the checkpoint are read into a buffer, in order; before each reading the files are dropped from
           the page cache (posix_fadvise), so that they come from the disk. Once into one small buffer that is used
           again and again, and once into as many bytes of new memory (huge pages) as the files have: a table, too, has
           to get its memory from the system
`save_vs_copy` and `load_vs_copy` are medians of times over those of the copies, of the one into a small buffer;
`load_vs_copy_into_memory` is that over the other. Some virtual machines hand free memory back to their host after a few
seconds and get it again page by page: before each contestant that needs much of it, PAUSE seconds pass, so that all
find it alike; `touch` is the time to get as much memory as the files have bytes. `save_extra_memory` and
`load_extra_memory` are the peak growth of the process's resident anonymous memory over the table, as a share of the
bytes of the file; loading into a table that is empty needs the table itself, which is not counted.
"""

import argparse
import contextlib
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseAdam, TableConfig
from grzoo.embeddings.io import load_tables, save_tables
from grzoo.embeddings.keyed import mix64

from .reporting import print_headline, spread, write_rows

DIM = 64
ROW_BYTES = 8 + 3 * 4 * DIM + 4  # id, row, two moments, step
BUFFER = 16 << 20
PAUSE = 5  # seconds
CONTESTANTS = ("save", "write_copy", "load", "read_copy", "read_into_memory", "touch")


def build() -> tuple[DynamicEmbeddingCollection, SparseAdam]:
    tables = DynamicEmbeddingCollection(
        [TableConfig(name="item", embedding_dim=DIM, initializer={"kind": "uniform", "scale": 0.05})],
        [FeatureConfig(name="ids", table="item")],
    )
    return tables, SparseAdam(tables, lr=0.01)


def fill(tables: DynamicEmbeddingCollection, rows: int) -> None:
    """Insert rows whose values are noise, so that no layer below can compress them."""
    generator = torch.Generator().manual_seed(0)
    for ids in torch.arange(rows).split(200_000):
        hashed = mix64(ids)
        assert isinstance(hashed, torch.Tensor)
        n = len(ids)
        values = {name: torch.rand(n, DIM, generator=generator) for name in ("rows", "exp_avg", "exp_avg_sq")}
        tables.import_rows("item", {"ids": hashed, "step": torch.ones(n, dtype=torch.int32), **values})


class PeakMemory:
    """Samples the resident anonymous memory of this process in a thread; `extra` is the peak over the beginning."""

    def __enter__(self) -> "PeakMemory":
        self._first = self._peak = anonymous_memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.extra = max(self._peak, anonymous_memory()) - self._first

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._peak = max(self._peak, anonymous_memory())


def anonymous_memory() -> int:
    """Bytes of this process that are in memory and in no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def write_copy(file: Path, size: int) -> None:
    """Write `size` bytes of noise from memory and wait for the disk, with the hints that saving gives to the system."""
    buffer = torch.randint(0, 256, (BUFFER,), dtype=torch.uint8).numpy().data
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    done = 0
    while done < size:
        done += os.write(descriptor, buffer[: min(BUFFER, size - done)])
        if done % (4 * BUFFER) == 0:
            os.posix_fadvise(descriptor, 0, done, os.POSIX_FADV_DONTNEED)
    os.fsync(descriptor)
    os.close(descriptor)


def read_copy(folder: Path) -> None:
    """Read all files of a folder into one buffer."""
    buffer = memoryview(bytearray(BUFFER))
    for file in sorted(folder.iterdir()):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def new_memory(size: int) -> memoryview:
    """Return `size` bytes that the system has not given yet, in huge pages where it has them."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)


def read_into_memory(folder: Path) -> None:
    """Read all files of a folder into memory that is new."""
    for file in sorted(folder.iterdir()):
        memory = new_memory(file.stat().st_size)
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(memory[:BUFFER]):
                memory = memory[count:]


def touch(size: int) -> None:
    """Get `size` bytes of memory from the system."""
    memory = new_memory(size)
    memory[:: mmap.PAGESIZE] = bytes(len(memory[:: mmap.PAGESIZE]))


def drop_cache(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def measure(rows: int, rounds: int, folder: Path) -> tuple[dict[str, list[float]], dict[str, int], int]:
    """Return seconds by contestant, extra bytes of saving and loading, and the bytes of the checkpoint."""
    tables, optimizer = build()
    fill(tables, rows)
    saved, copy = folder / "checkpoint", folder / "copy"
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    extra = {"save": 0, "load": 0}
    size = rows * ROW_BYTES
    fingerprints: dict[str, Any] = {}
    for _ in range(rounds):
        shutil.rmtree(saved, ignore_errors=True)
        with PeakMemory() as memory:
            seconds["save"].append(timed(lambda: fingerprints.update(save_tables(tables, saved, state=True))))
        extra["save"] = max(extra["save"], memory.extra)
        seconds["write_copy"].append(timed(lambda: write_copy(copy, size)))
        copy.unlink()
    table_bytes = tables.memory_bytes()
    tables.close()
    del optimizer
    for _ in range(rounds):
        loaded, attached = build()
        drop_cache(saved)
        time.sleep(PAUSE)
        with PeakMemory() as memory:
            seconds["load"].append(timed(lambda: load_tables(loaded, saved, fingerprints=fingerprints)))  # noqa: B023
        extra["load"] = max(extra["load"], memory.extra - min(table_bytes, loaded.memory_bytes()))
        assert loaded.num_rows() == rows
        loaded.close()
        del attached
        drop_cache(saved)
        seconds["read_copy"].append(timed(lambda: read_copy(saved)))
        drop_cache(saved)
        time.sleep(PAUSE)
        seconds["read_into_memory"].append(timed(lambda: read_into_memory(saved)))
        time.sleep(PAUSE)
        seconds["touch"].append(timed(lambda: touch(size)))
    return seconds, extra, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="of the table; default: 5.5 million (4.3 GB), 200,000 with --quick")
    parser.add_argument("--rounds", type=int, help="repetitions; default: 3, 2 with --quick")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: that of temporary files")
    parser.add_argument("--quick", action="store_true", help="a small table, under a minute")
    parser.add_argument("--output", type=Path, help="CSV to append to; default: results/checkpoint.csv unless quick")
    arguments = parser.parse_args()
    rows = arguments.rows or (200_000 if arguments.quick else 5_500_000)
    rounds = arguments.rounds or (2 if arguments.quick else 3)
    folder = Path(tempfile.mkdtemp(prefix="grzoo-checkpoint-", dir=arguments.folder))
    try:
        seconds, extra, size = measure(rows, rounds, folder)
    finally:
        shutil.rmtree(folder)
    output = arguments.output
    if output is None and not arguments.quick:
        output = Path(__file__).parent / "results" / "checkpoint.csv"
    write_rows(
        [
            {"contestant": name, "rows": rows, "dim": DIM, "bytes": size, "rounds": rounds}
            | spread(times)
            | {"gb_per_s": round(size / 1e9 / statistics.median(times), 3), "extra_bytes": extra.get(name, "")}
            for name, times in seconds.items()
        ],
        output,
    )
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print_headline(
        {
            "save_vs_copy": round(median["save"] / median["write_copy"], 3),
            "load_vs_copy": round(median["load"] / median["read_copy"], 3),
            "load_vs_copy_into_memory": round(median["load"] / median["read_into_memory"], 3),
            "save_extra_memory": round(extra["save"] / size, 4),
            "load_extra_memory": round(extra["load"] / size, 4),
        }
    )


if __name__ == "__main__":
    main()
