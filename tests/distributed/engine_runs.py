"""Everything that the engine's tests need from spawned ranks: one spawn per world size and test process."""

import functools
import logging
import shutil
import tempfile
import time
from atexit import register
from pathlib import Path
from typing import Any

import engine_cases as cases
from engine_jobs import Layout, Recipe, Result, engine_loop, load_result, save_result
from spawn import spawn

ADAMW, SGD, ADAGRAD = (cases.OPTIMIZERS[name] for name in ("adamw", "sgd", "adagrad"))
RUNS: dict[int, list[tuple[Recipe, Layout]]] = {
    1: [
        *((ADAMW, Layout(1, stage, 1)) for stage in (1, 2, 3)),
        (ADAMW, Layout(1, 2, 2)),
        (ADAMW, Layout(1, 1, 4)),
        (ADAMW, Layout(1, 1, 1, repeat=1)),
        (ADAMW, Layout(1, 1, 1, "bf16")),
    ],
    2: [
        *((ADAMW, Layout(2, stage, m)) for stage, m in ((1, 1), (2, 2), (3, 1), (2, 4))),
        (ADAMW, Layout(2, 2, 2, repeat=1)),
        *((recipe, Layout(2, stage, 2)) for recipe, stage in ((SGD, 1), (SGD, 3), (ADAGRAD, 2), (ADAGRAD, 3))),
        *((ADAMW, Layout(2, stage, 2, "bf16")) for stage in (2, 3)),
    ],
    3: [
        *((ADAMW, Layout(3, stage, m)) for stage, m in ((1, 4), (2, 1), (3, 2))),
        (SGD, Layout(3, 2, 1)),
        (ADAGRAD, Layout(3, 1, 2)),
    ],
}
OVERFLOWS = [(stage, dtype) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")]
RESUMES = [
    (1, "fp32", "adamw"),
    (2, "fp32", "adamw"),
    (3, "fp32", "adamw"),
    (2, "bf16", "adamw"),
    (2, "fp32", "sgd"),
    (3, "bf16", "sgd"),
    (1, "fp32", "adagrad"),
]


@functools.cache
def folder() -> Path:
    """Where ranks leave results and checkpoints; removed at exit."""
    path = Path(tempfile.mkdtemp(prefix="grzoo-engine-"))
    register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def ranks(world_size: int) -> dict[str, Any]:
    """Spawns the ranks once; what rank 0 has to say: elastic losses, seconds by job."""
    if world_size != 2:
        ranks(2)  # writes the checkpoint that the others load
    answers: dict[str, Any] = spawn(world_size, all_jobs, str(folder()), timeout=400.0)[0]
    return answers


def result_of(recipe: Recipe, layout: Layout) -> Result:
    """The training of one recipe in one layout."""
    ranks(layout.world_size)
    return load_result([_file(recipe, layout, rank) for rank in range(layout.world_size)])


def all_jobs(rank: int, world_size: int, where: str) -> dict[str, Any]:
    """Runs on every rank."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    global folder

    def folder() -> Path:
        return Path(where)

    seconds: dict[str, float] = {}

    def timed(name: str, job: Any, *arguments: Any) -> Any:
        begin = time.perf_counter()
        answer = job(rank, world_size, *arguments)
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - begin, 2)
        return answer

    for recipe, layout in RUNS[world_size]:
        timed("law 1", _train, recipe, layout)
    if world_size == 2:
        _engine_cases(timed)
    stages = {1: (1, 3), 2: (1, 3), 3: (2, 3)}[world_size]
    elastic = {stage: timed("elastic", cases.check_elastic, folder() / "resume", stage) for stage in stages}
    return {"elastic": elastic, "seconds": seconds}


def _engine_cases(timed: Any) -> None:
    for stage, dtype in OVERFLOWS:
        timed("overflow", cases.check_overflow, stage, dtype)
    timed("overflow leaves no trace", cases.check_overflow_leaves_no_trace)
    timed("bad steps", cases.check_bad_steps)
    timed("evaluation", cases.check_evaluation)
    timed("own loop", cases.check_own_loop)
    timed("raw deepspeed", cases.check_raw_deepspeed)
    for stage, dtype, optimizer in RESUMES:
        timed("resume", cases.check_resume, folder() / "resume", stage, dtype, optimizer)
    for stage in (2, 3):
        timed("frozen", cases.check_frozen_and_buffers, folder() / f"frozen-{stage}", stage)
    timed("lost schedule", cases.check_lost_schedule)
    timed("damage", cases.check_damage, folder() / "damage")
    timed("failed save", cases.check_failed_save, folder() / "failed")


def _train(rank: int, world_size: int, recipe: Recipe, layout: Layout) -> None:
    save_result(engine_loop(recipe, layout, rank), _file(recipe, layout, rank))


def _file(recipe: Recipe, layout: Layout, rank: int) -> Path:
    name = f"{recipe.dense[0]}-{layout.world_size}-{layout.stage}-{layout.micro_batches}-{layout.dtype}-{layout.repeat}"
    return folder() / f"{name}-{rank}.safetensors"
