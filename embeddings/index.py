"""embeddings.safetensors.index.json: which tables a folder holds, how they were made, and in which files they are."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import check_link, flush
from .shared_rows import SHARED_FILE
from .table import PhysicalTable

INDEX_NAME = "embeddings.safetensors.index.json"
FORMAT_VERSION = 1

_SHARD_NAME = re.compile(r"embeddings-(?:\d+-of-\d+|shared)\.safetensors")


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the index of a folder. Raises ValueError when there is none, or it is not one that we can read."""
    path = Path(folder) / INDEX_NAME
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        version = index["metadata"]["format_version"]
        files = shard_files(index) if version == FORMAT_VERSION else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is missing or not an index of embedding tables ({error!r})") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this program reads version {FORMAT_VERSION}")
    for name in files:
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise ValueError(f"{path} names {name!r} as a shard: only embeddings-*-of-*.safetensors beside it are read")
        check_link(path.with_name(name))
    return index


def remove_index(folder: str | os.PathLike[str]) -> None:
    """Take a folder's index away before files that it speaks of are replaced: a save that is killed in between then
    leaves a folder that does not load, not one of old and new parts."""
    path = Path(folder) / INDEX_NAME
    if path.is_file():
        path.unlink()
        flush(path.parent)


def shard_files(index: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that belong to an index; `read_index` has checked that they are plain ones."""
    metadata = index["metadata"]
    return [shard["file"] for shard in metadata["shards"]] + [SHARED_FILE] * bool(metadata.get("shared_rows"))


def describe_optimizer(name: str, table: PhysicalTable) -> dict[str, Any]:
    """Return an optimizer in JSON: its name and slots; width "dim" or 1."""
    slots = {s.name: {"width": "dim" if s.width == table.dim else 1, "fill": s.fill} for s in table.slots}
    return {"name": name, "slots": slots}
