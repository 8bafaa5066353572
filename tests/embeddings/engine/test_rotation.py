"""Checkpoints are limited without ever deleting the last complete one."""

import shutil
from pathlib import Path

import pytest
from grzoo.embeddings.engine import folder as folders
from grzoo.embeddings.engine import rotation


def write(save_dir: Path, *steps: int) -> None:
    for step in steps:
        target = save_dir / f"checkpoint-{step}"
        temporary = folders.start(target)
        folders.write_text(temporary / "a.json", "{}")
        folders.publish(target, {"a.json": folders.fingerprint(temporary / "a.json")}, step)


def names(save_dir: Path) -> list[str]:
    return sorted(path.name for path in save_dir.iterdir())


@pytest.mark.parametrize(
    ("limit", "kept"), [(0, [2, 9, 10, 30]), (1, [10, 30]), (2, [9, 10, 30]), (3, [2, 9, 10, 30]), (9, [2, 9, 10, 30])]
)
def test_the_newest_stay_and_later_steps_are_left_alone(tmp_path: Path, limit: int, kept: list[int]) -> None:
    write(tmp_path, 2, 9, 10, 30)
    rotation.rotate(tmp_path / "checkpoint-10", limit)
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in kept)


@pytest.mark.parametrize(
    ("keep", "limit", "kept"),
    [(2, 1, [2, 10]), (2, 2, [2, 10]), (2, 3, [2, 9, 10]), (9, 2, [9, 10]), (10, 2, [9, 10]), (10, 1, [10])],
)
def test_the_best_stays_whatever_the_limit(tmp_path: Path, keep: int, limit: int, kept: list[int]) -> None:
    write(tmp_path, 1, 2, 9, 10)
    rotation.rotate(tmp_path / "checkpoint-10", limit, keep=tmp_path / "x" / ".." / f"checkpoint-{keep}")
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in kept)


def test_damaged_ones_do_not_take_the_place_of_complete_ones(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4)
    (tmp_path / "checkpoint-3" / "a.json").unlink()
    rotation.rotate(tmp_path / "checkpoint-4", 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_what_killed_saves_and_deletions_left_goes(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-2.replaced")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-7.replaced")  # has no successor: stays
    for name in ("checkpoint-9.incomplete", "checkpoint-1.deleted", "checkpoint-1.replaced.deleted", "mine.deleted"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5.deleted").write_text("a file")
    rotation.rotate(tmp_path / "checkpoint-2", 0)
    assert names(tmp_path) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-5.deleted",
        "checkpoint-7.replaced",
        "mine.deleted",
    ]


def test_a_deletion_that_is_killed_leaves_nothing_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 2)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rotation.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            rotation.delete(tmp_path / "checkpoint-1")
    assert folders.candidates(tmp_path) == [tmp_path / "checkpoint-2"]
    write(tmp_path, 1)
    rotation.delete(tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-2"]
