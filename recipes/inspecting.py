"""What is in a checkpoint-N or an exported folder, and what differs between two. Reads safetensors and JSON only."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from grzoo.embeddings.engine.folder import check_file, read_json, read_seal
from grzoo.embeddings.files import fingerprint
from grzoo.embeddings.index import INDEX_NAME, read_index
from grzoo.embeddings.shared_rows import SHARED_FILE
from grzoo.embeddings.tensor_file import TensorFile
from torch import Tensor

ROWS_AT_ONCE = 1 << 16
_COUNTS = (
    "only_in_first",
    "only_in_second",
    "rows_changed",
    "state_changed",
)  # of the rows of a table, when they differ
Progress = Callable[[str], None]


def inspect(folder: Path, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Describe a folder: kind, step, completeness, tables, dense tensors.

    Args:
        folder: a checkpoint-N, or an export.
        progress: told of every file whose checksum is computed.

    Returns:
        JSON values; "problems" is empty when nothing is damaged. The tables of an export have checksums, in their
        index; its other files are parsed.

    Raises:
        ValueError: the folder has no tables.
    """
    if not (folder / INDEX_NAME).is_file():
        raise ValueError(f"{folder} has no {INDEX_NAME}: give a checkpoint-N or an exported folder")
    is_checkpoint = not (folder / "config.json").is_file()
    problems = list(_problems(folder, is_checkpoint, progress))
    report: dict[str, Any] = {
        "folder": str(folder),
        "kind": "checkpoint" if is_checkpoint else "export",
        "complete": not problems,
        "problems": problems,
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
    }
    if is_checkpoint and (folder / "state.json").is_file():
        state = read_json(folder / "state.json")
        report |= {"step": state.get("counters", {}).get("global_steps"), "written_by": state.get("written_by")}
    metadata = read_index(folder)["metadata"]
    report["has_checksums"] = is_checkpoint or "fingerprints" in metadata
    report |= {"seed": metadata["seed"], "optimizer": metadata["optimizer"], "shards": len(metadata["shards"])}
    files = [folder / shard["file"] for shard in metadata["shards"]]
    report["tables"] = {config["name"]: _table(config, metadata, files) for config in metadata["tables"]}
    report["dense"] = {name: list(shape) for name, shape in _dense_shapes(folder).items()}
    return report


def _problems(folder: Path, is_checkpoint: bool, progress: Progress) -> Iterator[str]:
    """What is missing or damaged."""
    try:
        sealed = read_seal(folder) if is_checkpoint else {}
    except ValueError as error:
        yield str(error)
        return
    checked = sealed if is_checkpoint else read_index(folder)["metadata"].get("fingerprints", {})
    for name, expected in checked.items():
        progress(name)
        try:
            check_file(folder, name, expected)
        except ValueError as error:
            yield str(error)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            TensorFile(file).close()
        except (ValueError, OSError) as error:
            yield str(error)
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_text())
        except (ValueError, OSError) as error:
            yield f"{file} does not parse: {error}"
    for name in sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl")):
        yield f"{folder} holds {name}, which may be a pickle and was not opened: remove it"


def _table(config: dict[str, Any], metadata: dict[str, Any], files: list[Path]) -> dict[str, Any]:
    prefix, columns, size = f"{config['name']}.", {}, 0
    for path in files:
        try:
            with TensorFile(path) as file:
                for name, stored in file.tensors.items():
                    column = name.removeprefix(prefix)
                    if name.startswith(prefix) and "." not in column:
                        columns[column] = [str(stored.dtype).removeprefix("torch."), *stored.shape[1:]]
                        size += stored.dtype.itemsize * torch.Size(stored.shape).numel()
        except (ValueError, OSError):
            continue  # told in "problems"
    return {
        "rows": metadata["rows"][config["name"]],
        "embedding_dim": config["embedding_dim"],
        "bytes": size,
        "columns": columns,
    }


def _dense_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("embeddings-")]


def _dense_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _dense_files(folder):
        try:
            with TensorFile(path) as file:
                shapes |= {name: stored.shape for name, stored in file.tensors.items()}
        except (ValueError, OSError):
            continue  # told in "problems"
    return shapes


def compare(folder: Path, other: Path) -> dict[str, Any]:
    """Say what differs between the tables and the dense tensors of two folders; {"equal": True, ...} when nothing does.

    Rows are read in the order of the files, a few at a time. A table or a column that only one of them has is named.
    """
    first, second = (read_index(path)["metadata"] for path in (folder, other))
    tables = {
        name: _compare_table(name, (folder, first), (other, second))
        for name in sorted(set(first["rows"]) & set(second["rows"]))
    }
    dense = _compare_dense(folder, other)
    shared = [fingerprint(path / SHARED_FILE) if (path / SHARED_FILE).is_file() else None for path in (folder, other)]
    policies = [metadata["policies"] for metadata in (first, second) if metadata.get("policies")]
    shared_differ, policies_differ = shared[0] != shared[1], len(policies) == 2 and policies[0] != policies[1]
    only = [sorted(set(a["rows"]) - set(b["rows"])) for a, b in ((first, second), (second, first))]
    differs = any(any(t[k] for k in _COUNTS) for t in tables.values())
    return {
        "equal": not (differs or any(only) or any(dense.values()) or shared_differ or policies_differ),
        "shared_rows_differ": shared_differ,
        "policies_differ": policies_differ,
        "tables_only_in_first": only[0],
        "tables_only_in_second": only[1],
        "tables": tables,
        "dense": dense,
    }


def _compare_table(name: str, first: tuple[Path, Any], second: tuple[Path, Any]) -> dict[str, Any]:
    """Compare a table by ranges of buckets, so that few rows are in memory."""
    result = {"only_in_first": 0, "only_in_second": 0, "rows_changed": 0, "largest_difference": 0.0, "state_changed": 0}
    rows = max(first[1]["rows"][name], second[1]["rows"][name])
    parts = max(1, min(4096, rows // ROWS_AT_ONCE))
    edges = [65536 * part // parts for part in range(parts + 1)]
    for begin, end in zip(edges, edges[1:], strict=False):
        ours, theirs = (_read_buckets(*side, name, begin, end) for side in (first, second))
        mine, others = torch.isin(ours["ids"], theirs["ids"]), torch.isin(theirs["ids"], ours["ids"])
        result["only_in_first"] += int((~mine).sum())
        result["only_in_second"] += int((~others).sum())
        difference = (ours["rows"].float()[mine] - theirs["rows"].float()[others]).abs().nan_to_num(torch.inf)
        if difference.numel():
            result["rows_changed"] += int((difference.amax(1) > 0).sum())
            result["largest_difference"] = max(result["largest_difference"], float(difference.max()))
        changed = torch.zeros(int(mine.sum()), dtype=torch.bool)
        for column in (ours.keys() & theirs.keys()) - {"ids", "rows"}:
            differs = ours[column][mine] != theirs[column][others]
            changed |= differs if differs.dim() == 1 else differs.any(1)
        result["state_changed"] += int(changed.sum())
    return result


def _read_buckets(folder: Path, metadata: Any, name: str, begin: int, end: int) -> dict[str, Tensor]:
    """All columns of the rows in the buckets [begin, end), sorted by id."""
    parts: dict[str, list[Tensor]] = {}
    for shard in metadata["shards"]:
        low, high = max(begin, shard["buckets"][0]), min(end, shard["buckets"][1])
        if low >= high:
            continue
        with TensorFile(folder / shard["file"]) as file:
            offsets = file.read(f"{name}.bucket_offsets")
            start, stop = (int(offsets[edge - shard["buckets"][0]]) for edge in (low, high))
            for column in _columns(file, name):
                parts.setdefault(column, []).append(file.read(f"{name}.{column}", start, stop))
    columns = {column: torch.cat(values) for column, values in parts.items()}
    order = columns["ids"].argsort()
    return {column: values[order] for column, values in columns.items()}


def _columns(file: TensorFile, table: str) -> list[str]:
    """What a file has of the rows of a table."""
    columns = (name.removeprefix(f"{table}.") for name in file.tensors if name.startswith(f"{table}."))
    return [column for column in columns if "." not in column and column != "bucket_offsets"]


def _compare_dense(folder: Path, other: Path) -> dict[str, Any]:
    first, second = _dense_shapes(folder), _dense_shapes(other)
    changed: dict[str, Any] = {}
    for name in sorted(set(first) & set(second)):
        ours, theirs = _read_dense(folder, name), _read_dense(other, name)
        if ours.shape != theirs.shape:
            changed[name] = f"{list(ours.shape)} in one, {list(theirs.shape)} in the other"
        elif not torch.equal(ours, theirs):
            changed[name] = float((ours.double() - theirs.double()).abs().nan_to_num(torch.inf).max())
    return {
        "only_in_first": sorted(set(first) - set(second)),
        "only_in_second": sorted(set(second) - set(first)),
        "changed": changed,
    }


def _read_dense(folder: Path, name: str) -> Tensor:
    for path in _dense_files(folder):
        with TensorFile(path) as file:
            if name in file.tensors:
                return file.read(name)
    raise AssertionError(name)
