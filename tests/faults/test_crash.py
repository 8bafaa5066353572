"""Law 3: whatever is killed, whenever, a checkpoint is found, and it is the last complete one or the one being saved.

A real save is recorded, every prefix of its file operations replayed, what was not synced dropped in many ways.
"""

import random
import time
from pathlib import Path

import pytest
from disk import Disk, Operation, Scratch, Tree, crashes, read_log
from grzoo.embeddings.engine import checkpoint as checkpoints
from grzoo.embeddings.exchange import Exchange
from recorded import run_job
from results import report

OUT = "run/out"


def checkpoint_files(tree: Tree, name: str) -> Tree:
    prefix = f"{OUT}/{name}/"
    return {path.removeprefix(prefix): content for path, content in tree.items() if path.startswith(prefix)}


def versions_of(operations: list[Operation]) -> list[Tree]:
    """The files of each checkpoint at the moment in which its save returned."""
    disk, versions = Disk(), []
    for operation in operations:
        disk.apply(operation)
        if operation.kind == "note":
            versions.append(checkpoint_files(disk.tree(), operation.path.removeprefix("saved ")))
    return versions


def found_in(scratch: Path) -> Tree | None:
    try:
        path = checkpoints.find_checkpoint(scratch / OUT, None, Exchange())
    except ValueError as error:
        assert "no complete checkpoint" in str(error)
        return None
    return {file.name: file.read_bytes() for file in path.iterdir()}


def check_every_crash(operations: list[Operation], scratch_folder: Path, draws: int) -> int:
    """Looks for the checkpoint in every state that a crash can leave; returns the number of different states."""
    versions = versions_of(operations)
    assert len(versions) == 4 and all(len(version) >= 6 for version in versions)
    disk, scratch, rng = Disk(), Scratch(scratch_folder), random.Random(0)
    saved, seen, states = -1, set(), 0
    for number, operation in enumerate([Operation("note", "begin"), *operations]):
        disk.apply(operation)
        saved += operation.path.startswith("saved ")
        following = operations[number] if number < len(operations) else None
        allowed = versions[max(saved, 0) : saved + 2] + [None] * (saved < 0)
        for how, tree in crashes(disk, following, rng, draws):
            key = hash((saved, tuple(sorted(tree.items(), key=lambda item: item[0]))))
            if key in seen:
                continue
            seen.add(key)
            states += 1
            scratch.show(tree)
            found = found_in(scratch.folder)
            assert found in allowed, (
                f"after operation {number} ({operation.kind} {operation.path}), {how}: {sorted(tree)}"
            )
    return states


def check_recorded(operations: list[Operation], root: Path) -> None:
    """Replayed to the end, the operations give what is on the real disk: none was missed."""
    disk = Disk()
    for operation in operations:
        disk.apply(operation)
    assert disk.tree() == {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


@pytest.mark.parametrize(
    ("world_size", "draws"), [(1, 3), pytest.param(2, 30, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_a_crash_at_any_operation_leaves_the_last_complete_checkpoint(
    tmp_path: Path, world_size: int, draws: int
) -> None:
    root, log, _ = run_job("trace", tmp_path, world_size)
    begin, operations = time.monotonic(), read_log(log)
    check_recorded(operations, root)
    states = check_every_crash(operations, tmp_path / "scratch", draws)
    report(
        f"crash at every file operation, {world_size} ranks",
        events=states,
        unusable=0,
        differing=0,
        seconds=time.monotonic() - begin,
        detail=f"{len(operations)} operations of 4 saves, distinct states of the disk",
    )
    assert len(operations) > 100 and states > 300
    for what, depth in (("a file", 4), ("the folder of a checkpoint", 3), ("the folder above", 2)):
        forgetful = [o for o in operations if o.kind != "sync" or o.path.count("/") + 1 != depth]
        assert len(forgetful) < len(operations)
        with pytest.raises(AssertionError):
            check_every_crash(forgetful, tmp_path / f"not syncing {what}", draws)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_a_disk_that_is_full_from_any_change_on_harms_nothing(tmp_path: Path, world_size: int) -> None:
    """Every rank raises with the reason, nothing half-written stays, a complete checkpoint is found each time."""
    begin = time.monotonic()
    _, _, answer = run_job("full", tmp_path, world_size)
    report(
        f"disk full at every change, {world_size} ranks",
        events=answer["failures"],
        unusable=0,
        differing=0,
        seconds=time.monotonic() - begin,
        detail="failed saves, the older checkpoint whole after each",
    )
    assert answer["failures"] > 50
