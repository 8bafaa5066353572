"""Ranks of a recipe: how they start, where they compute, and how a user's mistake ends all of them with one message."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from grzoo.embeddings.engine.runtime import prepare_environment

logger = logging.getLogger("grzoo")

_OWN_FOLDERS = ("data", "embeddings", "models", "recipes")
_PATIENCE = timedelta(hours=12)  # rank 0 may be downloading and preparing a large log
USER_ERROR = 2  # exit code of every rank after a user's mistake
PREEMPTED = 128 + signal.SIGTERM  # exit code of every rank that was told to end, saved and did: not 0, as work is left


class UserError(Exception):
    """A mistake in what the user gave: reported as one line, without a traceback."""


class Preempted(Exception):
    """The job was told to end (SIGTERM) and is ready to: reported as one line."""


@dataclass
class Runtime:
    """One rank of the job. `store` is None when the job has one rank."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, message: str) -> None:
        """Prints `message` once for the job."""
        if self.is_main:
            print(message, flush=True)

    def claim(self, key: str) -> bool:
        """True on exactly one of the ranks that call it with this key; False on the others or when rank 0 has gone."""
        if self.store is None:
            return True
        try:
            return self.store.add(f"grzoo/{key}", 1) == 1
        except (RuntimeError, OSError):
            return False

    def main_first(self, name: str, work: Callable[[], str]) -> str:
        """Runs `work` on rank 0 while the others wait; every rank gets its text.

        A failure on rank 0 stops the others with exit code 2 instead of leaving them waiting.
        """
        if self.store is None:
            return work()
        key = f"grzoo/main_first/{name}"
        if self.is_main:
            try:
                result = work()
            except BaseException:
                self.store.set(key, "-")
                raise
            self.store.set(key, "+" + result)
            return result
        try:
            self.store.wait([key], _PATIENCE)
            answer = self.store.get(key).decode()
        except (RuntimeError, OSError):  # rank 0, which holds the store, has ended
            answer = "-"
        if answer == "-":
            sys.exit(USER_ERROR)
        return answer[1:]

    def stop(self, message: str) -> NoReturn:
        """Ends this rank with exit code 2; of all ranks that stop, one prints its message."""
        if self.claim("error"):
            print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)


def start() -> Runtime:
    """Joins the ranks of the launcher (`deepspeed`, `torchrun`) or, without one, makes a job of one rank.

    Only the key-value store is opened here, so that a wrong argument is reported before anything heavy is imported.
    """
    with user_errors():
        prepare_environment()
    if "RANK" not in os.environ:
        _discover_mpi()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    runtime = Runtime(rank, int(os.environ.get("LOCAL_RANK", 0)), world, local_world)
    if world > 1:
        runtime.store, _, _ = next(iter(dist.rendezvous("env://", rank, world)))
    return runtime


def connect(runtime: Runtime, *, use_cpu: bool, local_rank: int = -1) -> torch.device:
    """Opens the process group (NCCL on GPUs, gloo on CPUs) unless one is open, and returns this rank's device."""
    if "LOCAL_RANK" not in os.environ and local_rank >= 0:
        runtime.local_rank = local_rank
        os.environ["LOCAL_RANK"] = str(local_rank)
    on_gpu = not use_cpu and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()
    device = torch.device("cuda", runtime.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        _share_cores(runtime)
    if not dist.is_initialized():
        store = runtime.store if runtime.store is not None else dist.HashStore()
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=runtime.rank, world_size=runtime.world_size)
    return device


@contextmanager
def user_errors() -> Iterator[None]:
    """What the parts raise for a user's mistake (ValueError, a missing file) becomes a UserError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def plain_warnings() -> None:
    """Has warnings of grzoo shown as a line `warning  TEXT`, those of others as Python does."""
    root, shown_by_python = Path(__file__).resolve().parents[1], warnings.formatwarning

    def shown(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        path = Path(filename).resolve()
        own = path.is_relative_to(root) and path.relative_to(root).parts[0] in _OWN_FOLDERS
        # A recipe of a clone beside the installed package is grzoo's as well.
        if category is UserWarning and (own or path == Path(sys.argv[0]).resolve()):
            return f"warning  {message}\n"
        return shown_by_python(message, category, filename, lineno, line)

    warnings.formatwarning = shown


def run(main: Callable[[Runtime, list[str]], None], argv: list[str] | None = None) -> None:
    """Runs `main(runtime, arguments)` of a recipe: one message and exit code 2 on every rank for a user's mistake."""
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has begun to replace: a line at every step.
    plain_warnings()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    runtime = Runtime(0, 0, 1, 1)
    try:
        runtime = start()
        main(runtime, sys.argv[1:] if argv is None else argv)
        if dist.is_initialized():
            dist.barrier()  # rank 0 holds the store, which the others may still need
            dist.destroy_process_group()
    except Preempted as reason:
        runtime.say(str(reason))
        dist.barrier()  # a launcher ends the other ranks as soon as one has left
        sys.exit(PREEMPTED)
    except UserError as error:
        logger.debug("caused by", exc_info=error)
        runtime.stop(str(error))


def _discover_mpi() -> None:
    """Asks MPI, which started this process, for the ranks."""
    try:
        from deepspeed.comm import mpi_discovery

        mpi_discovery(verbose=False)
    except ImportError as error:
        raise UserError(
            f"MPI started this recipe, and its ranks cannot be found out: {error}; install mpi4py, or start with "
            "`deepspeed` or `torchrun`"
        ) from error


def _share_cores(runtime: Runtime) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // runtime.local_world_size))
