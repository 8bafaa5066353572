"""Checkpoints written by some ranks at some ZeRO stage, read by others: what comes back, and how training goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine_cases as cases
from engine_jobs import Layout, Recipe, build_engine, build_steps, train

FIRST, LAST = 3, 6  # steps before the save, and in all


def write(rank: int, world_size: int, folder: str, stages: Sequence[int]) -> list[list[float]]:
    """A checkpoint per stage; the losses of the steps after it, without having stopped."""
    losses = []
    for stage in stages:
        layout = Layout(world_size, stage)
        engine, steps = build_engine(Recipe(), layout, **cases.SCHEDULED), build_steps(Recipe(), layout, rank)
        train(engine, steps, 0, FIRST)
        engine.save_checkpoint(folder, f"{world_size}-{stage}", client_state={"cursor": FIRST})
        losses.append(train(engine, steps, FIRST, LAST).losses)
        engine.destroy()
    return losses


def read(
    rank: int, world_size: int, folder: str, tags: Sequence[str], layouts: Sequence[tuple[int, str]]
) -> dict[str, dict[str, list[float]]]:
    """Losses after loading each checkpoint, by layout and tag; asserts that saving again gives the same bytes.

    One engine per layout loads all of them, so that nothing of one may survive the next.
    """
    losses: dict[str, dict[str, list[float]]] = {}
    for stage, dtype in layouts:
        layout = Layout(world_size, stage, 1, dtype)
        engine, steps = build_engine(Recipe(), layout, **cases.SCHEDULED), build_steps(Recipe(), layout, rank)
        for tag in tags:
            engine.load_checkpoint(folder, tag)
            again = engine.save_checkpoint(
                folder, f"{tag}-again-{world_size}-{stage}-{dtype}", client_state={"cursor": 3}
            )
            if rank == 0:
                assert_same_files(Path(folder) / tag, again)
            losses.setdefault(f"{stage}-{dtype}", {})[tag] = train(engine, steps, FIRST, LAST).losses
        engine.destroy()
    return losses


def assert_same_files(one: Path, two: Path) -> None:
    """Ids, rows, optimizer state, dense weights, counters: equal bit for bit; only who wrote it may differ."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in set(names) - {"COMPLETE.json", "state.json"}:
        assert (one / name).read_bytes() == (two / name).read_bytes(), f"{name} of {one.name} and {two.name}"
    states: list[dict[str, Any]] = [json.loads((folder / "state.json").read_text()) for folder in (one, two)]
    assert all(state.pop("written_by") for state in states)
    assert states[0] == states[1], f"state.json of {one.name} and {two.name}"


def resume(rank: int, world_size: int, folder: str, runs: Sequence[tuple[int, str, str]]) -> None:
    """Resume == never stopped, for each (stage, dtype, optimizer)."""
    for stage, dtype, optimizer in runs:
        cases.check_resume(rank, world_size, Path(folder), stage, dtype, optimizer)
