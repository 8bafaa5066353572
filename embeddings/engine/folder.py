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
    temporary.mkdir(parents=True)
    return temporary


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
    temporary.rename(folder)
    flush(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError naming the file when it is missing or is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
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
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise ValueError(f"{folder / COMPLETE} is damaged: its list of files is not one of plain names")
    unexpected = sorted(f.name for f in folder.glob("*.safetensors") if f.name not in files)
    if unexpected:
        raise ValueError(f"{folder} holds {unexpected[0]}, which is not part of it: remove the file")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing")
        size = (folder / name).stat().st_size
        if size != expected.get("size"):
            raise ValueError(f"{folder} is damaged: {name} has {size} bytes instead of {expected.get('size')}")
    return files


def check_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    """Raises ValueError when the checksum of a file is not the expected one."""
    if fingerprint(folder / name) != expected:
        raise ValueError(f"{folder} is damaged: the checksum of {name} is wrong")


def candidates(save_dir: Path) -> list[Path]:
    """Checkpoints below `save_dir` that have their name, newest step first; complete or damaged."""
    found: list[tuple[int, Path]] = []
    for path in save_dir.iterdir() if save_dir.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        if match[2] and (path.with_name(path.name.removesuffix(".replaced"))).exists():
            continue  # its successor took the name
        found.append((int(match[1]), path))
    return [path for _, path in sorted(found, key=lambda item: item[0], reverse=True)]
