"""Run a function on several gloo ranks of this machine, with a time limit, and get its results or its exceptions back.

`from spawn import spawn` works in every test (see tests/conftest.py). The function lives in a module beside this one,
so that fresh processes can import it.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankFailed(AssertionError):
    """Some rank raised, or did not finish in time; the message holds the tracebacks."""


def _run(
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    environment: dict[str, str],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    out = Path(folder)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{out / 'rendezvous'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = fn(rank, world_size, *args)
        (out / f"result-{rank}").write_text(json.dumps(result))
        dist.destroy_process_group()
    except BaseException:
        (out / f"error-{rank}").write_text(traceback.format_exc())
        sys.exit(1)


def spawn(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run fn(rank, world_size, *args) on `world_size` fresh processes joined by gloo; return what each returned (JSON).

    Raises RankFailed with every traceback when a rank raises or dies; when `timeout`
    seconds pass all are killed, so that a collective that hangs fails the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")  # one process imports torch, the ranks are its forks
        context.set_forkserver_preload(["torch", "torch._dynamo"])
        ranks = [
            context.Process(
                target=_run, args=(rank, world_size, folder, timeout, dict(os.environ), fn, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        late = _join(ranks, timeout)
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        codes = [process.exitcode for process in ranks]
        if late or errors or any(codes):
            limit = f"ranks {late} did not finish within {timeout} s\n" if late else ""
            raise RankFailed(f"{limit}exit codes {codes}\n" + "\n".join(errors))
        return [json.loads((Path(folder) / f"result-{rank}").read_text()) for rank in range(world_size)]


def _join(ranks: list[Any], timeout: float) -> list[int]:
    """Wait for all; when one has failed the others get five seconds more. Kill the rest, return their numbers."""
    deadline = time.monotonic() + timeout
    running = dict(enumerate(ranks))
    while running and time.monotonic() < deadline:
        wait([p.sentinel for p in running.values()], timeout=deadline - time.monotonic())
        if any(p.exitcode for p in running.values()):
            deadline = min(deadline, time.monotonic() + 5.0)
        running = {rank: p for rank, p in running.items() if p.exitcode is None}
    for process in running.values():
        process.kill()
        process.join()
    return list(running)
