"""Law 3: a checkpoint folder is complete or absent."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from grzoo.embeddings.engine import folder as folders


def write(target: Path, contents: dict[str, str], step: int = 1) -> None:
    temporary = folders.start(target)
    for name, text in contents.items():
        folders.write_text(temporary / name, text)
    folders.publish(target, {name: folders.fingerprint(temporary / name) for name in contents}, step)


def check(target: Path) -> None:
    for name, expected in folders.read_seal(target).items():
        folders.check_file(target, name, expected)


def test_round_trip_and_replacement(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-5"
    write(target, {"a.safetensors": "one", "b.json": "{}"})
    check(target)
    write(target, {"a.safetensors": "two"})
    check(target)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert sorted(path.name for path in target.iterdir()) == [folders.COMPLETE, "a.safetensors"]


def test_unfinished_is_absent(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-1", {"a": "x"})
    folders.start(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    assert folders.candidates(tmp_path) == [tmp_path / "checkpoint-1"]
    assert folders.candidates(tmp_path / "nowhere") == []


def test_leftovers_of_a_killed_save_go(tmp_path: Path) -> None:
    (folders.start(tmp_path / "checkpoint-1") / "old").write_text("half")
    assert list(folders.start(tmp_path / "checkpoint-1").iterdir()) == []


@pytest.mark.parametrize("killed_at", range(1, 4))
def test_killed_while_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int) -> None:
    """Killed before the n-th rename or removal of a replacement: the old or the new one can be found, complete."""
    target = tmp_path / "checkpoint-7"
    write(target, {"a": "old"})
    calls = 0

    def killing(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killing(Path.rename))
        patch.setattr(folders.shutil, "rmtree", killing(folders.shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            write(target, {"a": "new"})
    newest = folders.candidates(tmp_path)[0]
    check(newest)
    assert (newest / "a").read_text() == ("new\n" if killed_at == 3 else "old\n")
    write(target, {"a": "newer"})
    assert folders.candidates(tmp_path) == [target]
    assert (target / "a").read_text() == "newer\n"


def test_newest_first(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write(tmp_path / f"checkpoint-{step}", {"a": "x"})
    assert [path.name for path in folders.candidates(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]


def seal(target: Path, files: Any) -> None:
    (target / folders.COMPLETE).write_text(json.dumps({"format_version": 1, "step": 1, "files": files}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: (t / folders.COMPLETE).unlink(), "never finished"),
        (lambda t: (t / folders.COMPLETE).write_text("{"), "not valid JSON"),
        (lambda t: (t / folders.COMPLETE).write_text("[]"), "not an object"),
        (lambda t: (t / folders.COMPLETE).write_text('{"format_version": 2}'), "format version 2"),
        (lambda t: (t / folders.COMPLETE).write_text('{"format_version": 1, "files": {"../x": {}}}'), "plain names"),
        (lambda t: (t / "a.safetensors").unlink(), "a.safetensors is missing"),
        (lambda t: (t / "a.safetensors").write_text("on"), "2 bytes instead of 4"),
        (lambda t: (t / "a.safetensors").write_text("onf\n"), "checksum of a.safetensors"),
        (lambda t: (t / "more.safetensors").write_text("x"), "more.safetensors, which is not part of it"),
        (lambda t: (t / "more.json").write_text("x"), "more.json, which is not part of it"),
        (lambda t: (t / "b").unlink() or (t / "b").mkdir(), "b is missing"),
        (lambda t: (t / "b").rename(t.parent / "b") and (t / "b").symlink_to("../b"), "b is a link"),
        (lambda t: (t / "b").unlink() or (t / "b").symlink_to("b"), "b is a link"),
        (lambda t: (t / folders.COMPLETE).write_text("[" * 10**6), "not valid JSON"),
        (lambda t: (t / folders.COMPLETE).write_bytes(b"\xff"), "not valid JSON"),
        (lambda t: seal(t, ["a.safetensors"]), "plain names"),
        (lambda t: seal(t, {"..": {}}), "plain names"),
        (lambda t: seal(t, {"": {}}), "plain names"),
        (lambda t: seal(t, {"/etc/hostname": {}}), "plain names"),
        (lambda t: seal(t, {"a.safetensors": 3}), "no size and checksum of a.safetensors"),
        (lambda t: seal(t, {"a.safetensors": {"size": 4}}), "checksum of a.safetensors"),
        (lambda t: seal(t, {"a.safetensors": {"size": 2**60}}), f"4 bytes instead of {2**60}"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage: Any, message: str) -> None:
    target = tmp_path / "checkpoint-1"
    write(target, {"a.safetensors": "one", "b": "two"})
    damage(target)
    with pytest.raises(ValueError, match=message):
        check(target)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "scheduler.pkl", "notes.txt"])
def test_files_of_other_kinds_are_never_opened(tmp_path: Path, name: str) -> None:
    target = tmp_path / "checkpoint-1"
    write(target, {"a.safetensors": "one"})
    (target / name).write_bytes(b"\x80\x04.")
    opened: list[str] = []
    watching = True
    sys.addaudithook(lambda event, args: opened.append(os.fspath(args[0])) if watching and event == "open" else None)
    check(target)
    watching = False
    assert str(target / "a.safetensors") in opened and str(target / name) not in opened


def test_new_folders_above_a_checkpoint_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(folders, "flush", flushed.append)
    folders.start(tmp_path / "a" / "b" / "checkpoint-1")
    assert flushed == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "checkpoint-1"
    write(target, {"a": "old"})
    original = Path.rename

    def rename(path: Path, to: Path) -> Path:
        if path.suffix == ".incomplete":
            raise OSError(28, "No space left on device")
        return original(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="No space"):
        write(target, {"a": "new"})
    check(target)
    assert (target / "a").read_text() == "old\n"
