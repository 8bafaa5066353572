"""embeddings.safetensors.index.json: which tables a folder holds, how they were made, and in which files they are."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .shared_rows import SHARED_FILE
from .table import PhysicalTable

INDEX_NAME = "embeddings.safetensors.index.json"
FORMAT_VERSION = 1


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the index of a folder. Raises ValueError when there is none, or it is not one that we can read."""
    path = Path(folder) / INDEX_NAME
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        version = index["metadata"]["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is missing or not an index of embedding tables ({error!r})") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this program reads version {FORMAT_VERSION}")
    return index


def shard_files(index: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that belong to an index. Raises ValueError unless they are plain names."""
    metadata = index["metadata"]
    files = [shard["file"] for shard in metadata["shards"]] + [SHARED_FILE] * bool(metadata.get("shared_rows"))
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"the index is damaged: {name!r} is not the name of a file beside it")
    return files


def describe_optimizer(name: str, table: PhysicalTable) -> dict[str, Any]:
    """Return an optimizer in JSON: its name and slots; width "dim" or 1."""
    slots = {s.name: {"width": "dim" if s.width == table.dim else 1, "fill": s.fill} for s in table.slots}
    return {"name": name, "slots": slots}
