"""A checkpoint folder is complete or absent: temporary name, fsync, COMPLETE.json with checksums, rename."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from grzoo.embeddings.files import Fingerprint, fingerprint, flush, write_text

COMPLETE = "COMPLETE.json"
FORMAT_VERSION = 1

_NAME = re.compile(r"checkpoint-(\d+)(\.replaced)?")
_READ = (".safetensors", ".json")  # a file of another kind that somebody left in a checkpoint is never opened


def temporary_path(folder: Path) -> Path:
    """Where `folder` is written before it has its name."""
    return folder.with_name(folder.name + ".incomplete")


def replaced_path(folder: Path) -> Path:
    """Where a complete `folder` waits for the moment in which a new one takes its name."""
    return folder.with_name(folder.name + ".replaced")


def start(folder: Path) -> Path:
    """An empty temporary folder for `folder`; leftovers of a save that was killed are removed."""
    temporary = temporary_path(folder)
    if temporary.exists():
        shutil.rmtree(temporary)
    make_folder(temporary)
    return temporary


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, each with its name on the disk: else a crash may take the whole tree away."""
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    folder.mkdir()
    flush(folder.parent)


def publish(folder: Path, files: dict[str, Fingerprint], step: int) -> None:
    """Seals the temporary folder of `folder`, whose files are on the disk, with COMPLETE.json; gives it its name."""
    temporary, replaced = temporary_path(folder), replaced_path(folder)
    seal = {"format_version": FORMAT_VERSION, "step": step, "files": dict(sorted(files.items()))}
    write_text(temporary / COMPLETE, json.dumps(seal, indent=1))
    flush(temporary)
    if folder.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        folder.rename(replaced)
    try:
        temporary.rename(folder)
    except OSError:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise
    flush(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError naming the file when it is missing or is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, not an object")
    return value


def read_seal(folder: Path) -> dict[str, dict[str, Any]]:
    """The files that a complete checkpoint must have, with size and checksum.

    Raises:
        ValueError: there is no COMPLETE.json, it is of another format, or files are missing, cut short or unexpected.
    """
    if not (folder / COMPLETE).is_file():
        raise ValueError(f"{folder} has no {COMPLETE}: it is not a checkpoint, or was never finished")
    seal = read_json(folder / COMPLETE)
    if seal.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {seal.get('format_version')!r}; this grzoo reads {FORMAT_VERSION}"
        )
    files = seal.get("files")
    if not isinstance(files, dict) or not all(map(_is_plain, files)):
        raise ValueError(f"{folder / COMPLETE} is damaged: its list of files is not one of plain names")
    unexpected = sorted(f.name for f in folder.iterdir() if f.suffix in _READ and f.name not in {*files, COMPLETE})
    if unexpected:
        raise ValueError(f"{folder} holds {unexpected[0]}, which is not part of it: remove the file")
    for name, expected in files.items():
        _check_size(folder, name, expected)
    return files


def sealed_step(folder: Path) -> int:
    """The step that COMPLETE.json says; ValueError when it says none."""
    step = read_json(folder / COMPLETE).get("step")
    if type(step) is not int:
        raise ValueError(f"{folder / COMPLETE} is damaged: its step is {step!r}")
    return step


def check_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    """Raises ValueError when a file cannot be read or its checksum is not the expected one."""
    try:
        found = fingerprint(folder / name)
    except OSError as error:
        raise ValueError(f"{folder} is damaged: {name} cannot be read: {error.strerror}") from error
    if found != expected:
        raise ValueError(f"{folder} is damaged: the checksum of {name} is wrong")


def _is_plain(name: str) -> bool:
    return Path(name).name == name and name not in ("", "..")


def _check_size(folder: Path, name: str, expected: Any) -> None:
    if not isinstance(expected, dict):
        raise ValueError(f"{folder / COMPLETE} is damaged: it has no size and checksum of {name}")
    if (folder / name).is_symlink():
        raise ValueError(f"{folder} is damaged: {name} is a link, and a checkpoint holds files only")
    if not (folder / name).is_file():
        raise ValueError(f"{folder} is damaged: {name} is missing")
    size = (folder / name).stat().st_size
    if size != expected.get("size"):
        raise ValueError(f"{folder} is damaged: {name} has {size} bytes instead of {expected.get('size')}")


def is_sealed(folder: Path) -> bool:
    """Whether a folder has COMPLETE.json and all files in their right size; checksums are not compared."""
    try:
        read_seal(folder)
    except ValueError:
        return False
    return True


def candidates(save_dir: Path) -> list[Path]:
    """Checkpoints below `save_dir` that have their name, newest step first; complete or damaged.

    One that was being replaced when the save was killed comes after the one that was to take its name.
    """
    found: list[tuple[int, bool, Path]] = []
    for path in save_dir.iterdir() if save_dir.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is not None and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [path for *_, path in sorted(found, reverse=True)]
