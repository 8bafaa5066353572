"""A program that saves a micro engine's checkpoints on one or more ranks, to be run below recorder.c.

LD_PRELOAD=recorder.so ... python save_job.py trace|full FOLDER REPORT RANK WORLD_SIZE RENDEZVOUS
"""

import ctypes
import errno
import functools
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

import torch
import torch.distributed as dist
from engine_jobs import Layout, Recipe, build_engine, build_steps, train
from grzoo.embeddings import files, saving, shards, tensor_file
from grzoo.embeddings.engine import checkpoint as checkpoints
from grzoo.embeddings.engine.rotation import delete, rotate

DENSE_SHARD_BYTES, TABLE_SHARD_BYTES = 12_000, 9_000  # several files of each kind,
BLOCK = 4096  # most of them written in several calls past the page cache


class Job:
    """A micro engine that trains one step before each save."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        layout = Layout(world_size, 2, 1)
        self.engine = build_engine(Recipe(), layout)
        self.steps = build_steps(Recipe(), layout, rank)
        self.done = 0

    def save(self, tag: str, *, limit: int = 0) -> None:
        train(self.engine, self.steps, self.done, self.done + 1)
        self.done += 1
        path = self.engine.save_checkpoint(self.folder, tag)
        if self.rank == 0:
            note(f"saved {tag}")
            rotate(path, limit)
        dist.barrier()


def note(text: str) -> None:
    """A remark in the log of operations."""
    with open(os.environ["GRZOO_TRACE_LOG"], "a") as log:
        log.write(f"note\t{text}\t-\t0\t0\n")


def trace(job: Job) -> dict[str, Any]:
    """The first checkpoint, one more that takes its place, one under the same name, one over a leftover."""
    job.save("checkpoint-1")
    job.save("checkpoint-2", limit=1)
    job.save("checkpoint-2")
    if job.rank == 0:
        leftover = job.folder / "checkpoint-9.incomplete"
        leftover.mkdir()
        (leftover / "state.json").write_text("half a save")
    dist.barrier()
    job.save("checkpoint-9", limit=2)
    return {}


def full(job: Job) -> dict[str, Any]:
    """The disk is full from the k-th change of a save on, on one rank, for every k: what is left each time."""
    recorder: Any = ctypes.CDLL(None)
    job.save("checkpoint-1")
    before = contents(job.folder / "checkpoint-1")
    messages: list[str] = []
    for tag in ("checkpoint-2", "checkpoint-1"):  # beside it, and in its place
        for culprit in range(job.world_size):
            for k in range(10_000):
                recorder.recorder_fail_after(k if job.rank == culprit else -1)
                try:
                    job.engine.save_checkpoint(job.folder, tag)
                except OSError as error:
                    messages.append(str(error))
                else:
                    messages.append("saved")
                recorder.recorder_fail_after(-1)
                dist.barrier()
                found = checkpoints.find_checkpoint(job.folder, None, job.engine.exchange)
                assert not list(job.folder.glob("*.incomplete")), f"{tag}: change {k} left something"
                if messages[-1] == "saved":
                    break
                assert os.strerror(errno.ENOSPC) in messages[-1], messages[-1]
                assert found.name in (tag, "checkpoint-1", "checkpoint-1.replaced"), f"change {k} left {found}"
                if found.name != tag:
                    assert contents(found) == before, f"{tag}: change {k} harmed the old checkpoint"
            dist.barrier()
            if job.rank == 0 and tag != "checkpoint-1":
                delete(job.folder / tag)
            dist.barrier()
    return {"failures": sum(text != "saved" for text in messages)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main(task: str, folder: str, report: str, rank: str, world_size: str, rendezvous: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    for module in (files, saving, shards, tensor_file):
        module.BLOCK = BLOCK
    checkpoints.save_dense = functools.partial(checkpoints.save_dense, max_bytes=DENSE_SHARD_BYTES)
    checkpoints.save_tables = functools.partial(checkpoints.save_tables, max_shard_bytes=TABLE_SHARD_BYTES)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world_size))
    job = Job(Path(folder), int(rank), int(world_size))
    answer = {"trace": trace, "full": full}[task](job)
    Path(f"{report}-{rank}").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
