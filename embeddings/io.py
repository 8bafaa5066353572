"""Tables in safetensors files: the same bytes from any number of ranks, readable by any other number.

A folder holds embeddings-00001-of-0000N.safetensors and embeddings.safetensors.index.json. Each shard has the rows of a
range of hash buckets; per logical table "<table>.ids" int64 [n], "<table>.rows" float32 [n, dim] and, with optimizer
state, "<table>.<slot>" float32 [n, width], "<table>.step" int32 [n] and "<table>.bucket_offsets" int64 [buckets + 1],
sorted by (bucket, id). The index names the configs of the tables, the seed, the hash, the optimizer and the shards.
embeddings-shared.safetensors holds the rows that unknown ids share, where tables have them.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import TableConfig
from .files import obey_umask
from .hashing import HASH_VERSION, NUM_BUCKETS, bucket, bucket_range
from .kernels import STEP_SLOT, Slot
from .shards import LocalRows, Shard, bucket_offsets, collect_shards, plan_shards
from .shared_rows import SHARED_FILE, load_shared, shared_tensors
from .table import PhysicalTable

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection

INDEX_NAME = "embeddings.safetensors.index.json"
FORMAT_VERSION = 1
ROWS_AT_ONCE = 1 << 18  # read from a shard


def save_tables(
    collection: "DynamicEmbeddingCollection",
    folder: str | os.PathLike[str],
    *,
    state: bool,
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Write all tables into a folder that every rank can reach (made when missing). Collective.

    Each file, and the index last, appears under its name when it is complete. Shards of an earlier save in the folder
    go.

    Args:
        collection: the tables.
        folder: where to.
        state: whether to write the optimizer state and the step of each row.
        max_shard_bytes: bound of the rows in one file (one bucket is never cut).

    Raises:
        ValueError: state without an attached optimizer.
        OSError or RuntimeError: on every rank, when a file could not be written.
    """
    exchange, path = collection.exchange, Path(folder)
    if state and collection.optimizer is None:
        raise ValueError("state=True saves the state of a sparse optimizer, and none is attached to the tables")
    tables = [LocalRows(collection, name, state=state) for name in collection.table_names]
    weights = torch.stack([rows.rows_per_bucket * rows.row_bytes() for rows in tables])
    shards = plan_shards(weights.sum(0), max_shard_bytes)
    problem = _attempt(lambda: path.mkdir(parents=True, exist_ok=True))
    exchange.agree(problem)
    for turn in _turns(shards, exchange.world_size):
        tensors = collect_shards(tables, turn, exchange)
        shard = turn[exchange.rank]
        if shard is not None and problem is None:  # after a failure only the collectives go on
            if state:
                tensors |= {f"{rows.name}.bucket_offsets": bucket_offsets(rows, shard) for rows in tables}
            problem = _attempt(_writer(path / shard.file, tensors))
    shared = shared_tensors(collection, state=state)
    if shared and exchange.rank == 0 and problem is None:
        problem = _attempt(_writer(path / SHARED_FILE, shared))
    exchange.agree(problem)
    index = {"metadata": _metadata(collection, tables, shards, state=state)}
    problem = _attempt(lambda: _publish(path, index)) if exchange.rank == 0 else None
    exchange.agree(problem)


def _turns(shards: list[Shard], world_size: int) -> list[list[Shard | None]]:
    """Who writes what: turns in which each rank writes at most one shard, one of those whose first bucket it owns."""
    queues: list[list[Shard]] = [[] for _ in range(world_size)]
    for shard in shards:
        queues[shard.first * world_size // NUM_BUCKETS].append(shard)
    longest = max(map(len, queues))
    return [[queue[i] if i < len(queue) else None for queue in queues] for i in range(longest)]


def _attempt(action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None


def _writer(path: Path, tensors: dict[str, Tensor]) -> Callable[[], None]:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return lambda: _replace(path, lambda temporary: save_file(contiguous, temporary, {"format": "pt"}))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, push it to the disk and give it its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    obey_umask(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _publish(folder: Path, index: Mapping[str, Any]) -> None:
    _replace(folder / INDEX_NAME, lambda temporary: temporary.write_text(json.dumps(index, indent=2) + "\n"))
    for stale in set(folder.glob("embeddings-*-of-*.safetensors")) - {folder / name for name in shard_files(index)}:
        stale.unlink()


def _metadata(
    collection: "DynamicEmbeddingCollection", tables: list[LocalRows], shards: list[Shard], *, state: bool
) -> dict[str, Any]:
    optimizer = collection.optimizer
    return {
        "format_version": FORMAT_VERSION,
        "hash_version": HASH_VERSION,
        "num_buckets": NUM_BUCKETS,
        "seed": collection.seed,
        "tables": [config.to_dict() for config in collection.tables.values()],
        "optimizer": _describe(type(optimizer).__name__, collection.physical[0]) if state else None,
        "rows": {rows.name: rows.count(0, NUM_BUCKETS) for rows in tables},
        "shared_rows": [name for name, config in collection.tables.items() if config.unknown == "shared"],
        "shards": [
            {
                "file": shard.file,
                "buckets": [shard.first, shard.end],
                "rows": {rows.name: rows.count(shard.first, shard.end) for rows in tables},
            }
            for shard in shards
        ],
    }


def _describe(name: str, table: PhysicalTable) -> dict[str, Any]:
    """An optimizer in JSON: its name and slots; width "dim" or 1."""
    slots = {s.name: {"width": "dim" if s.width == table.dim else 1, "fill": s.fill} for s in table.slots}
    return {"name": name, "slots": slots}


# ---------------------------------------------------------------------- loading


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
    """Return the names of the files that belong to an index."""
    metadata = index["metadata"]
    return [shard["file"] for shard in metadata["shards"]] + [SHARED_FILE] * bool(metadata.get("shared_rows"))


def load_tables(
    collection: "DynamicEmbeddingCollection", folder: str | os.PathLike[str], *, state: bool | None = None
) -> None:
    """Replace the rows of all tables by those of a folder; each rank reads the rows that it owns. Collective.

    On an error the tables stay as they were, on every rank.

    Args:
        collection: tables with the configs that were saved.
        folder: written by `save_tables` on any number of ranks.
        state: load the optimizer state: True, False (rows start with fresh state), or None for "if there is one".

    Raises:
        ValueError: on every rank, when the folder does not fit (tables, widths, initial values, seed, hash, optimizer;
        both
            sides are named) or is damaged.
    """
    exchange = collection.exchange
    fresh: list[PhysicalTable] = []
    problem = None
    try:
        metadata = read_index(folder)["metadata"]
        with_state = _check(collection, metadata, state)
        fresh = _empty_tables(collection, metadata, with_state)
        for shard in metadata["shards"]:
            first, end = bucket_range(exchange.rank, exchange.world_size)
            first, end = max(first, shard["buckets"][0]), min(end, shard["buckets"][1])
            if first < end:
                _load_shard(collection, fresh, Path(folder), shard, (first, end), with_state)
        if metadata.get("shared_rows"):
            load_shared(collection, fresh, Path(folder) / SHARED_FILE, state=with_state)
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        problem = error if isinstance(error, ValueError) else ValueError(f"cannot load tables from {folder}: {error!r}")
    exchange.agree(problem)
    for name, expected in metadata["rows"].items():
        position, logical = collection.placement[name]
        if (found := exchange.sum_int(fresh[position].num_rows(logical))) != expected:
            raise ValueError(f"table {name!r} in {folder} should have {expected} rows, its shards hold {found}")
    collection.replace_physical(fresh)


def _check(collection: "DynamicEmbeddingCollection", metadata: Mapping[str, Any], state: bool | None) -> bool:
    """Raise ValueError where file and collection differ; return whether to load the state."""
    saved = {config["name"]: TableConfig.from_dict(config) for config in metadata["tables"]}
    pairs: list[tuple[str, Any, Any]] = [
        ("hash version", metadata["hash_version"], HASH_VERSION),
        ("number of buckets", metadata["num_buckets"], NUM_BUCKETS),
        ("seed", metadata["seed"], collection.seed),
        ("tables", sorted(saved), sorted(collection.tables)),
    ]
    for name, config in collection.tables.items():
        for field in ("embedding_dim", "initializer", "init_key"):
            pairs.append((f"{field} of table {name!r}", getattr(saved.get(name), field, None), getattr(config, field)))
    for what, theirs, ours in pairs:
        if theirs != ours:
            raise ValueError(f"{what}: the files have {theirs!r}, this collection has {ours!r}")
    edges = [shard["buckets"] for shard in metadata["shards"]]
    if [0, *(end for _, end in edges)] != [*(first for first, _ in edges), NUM_BUCKETS]:
        raise ValueError(f"the shards do not cover each bucket once: {edges}")
    return _check_optimizer(collection, metadata["optimizer"], state)


def _check_optimizer(
    collection: "DynamicEmbeddingCollection", saved: Mapping[str, Any] | None, state: bool | None
) -> bool:
    if saved is None:
        if state:
            raise ValueError("state=True, but the files hold no optimizer state: pass state=False to start afresh")
        return False
    optimizer = collection.optimizer
    if state is not False and optimizer is not None:
        ours = _describe(type(optimizer).__name__, collection.physical[0])
        if ours != saved:
            raise ValueError(
                f"optimizer: the files have the state of {saved}, attached is {ours}: pass state=False to start afresh"
            )
    return state is not False


def _empty_tables(
    collection: "DynamicEmbeddingCollection", metadata: Mapping[str, Any], with_state: bool
) -> list[PhysicalTable]:
    fresh = [table.empty_like() for table in collection.physical]
    if with_state and collection.optimizer is None:
        for table in fresh:
            slots = metadata["optimizer"]["slots"].items()
            table.set_slots([Slot(n, table.dim if s["width"] == "dim" else 1, s["fill"]) for n, s in slots])
    return fresh


def _load_shard(
    collection: "DynamicEmbeddingCollection",
    fresh: list[PhysicalTable],
    folder: Path,
    shard: Mapping[str, Any],
    span: tuple[int, int],
    with_state: bool,
) -> None:
    """Read the rows of buckets [span) of one shard into fresh tables."""
    opened: AbstractContextManager[Any] = safe_open(folder / shard["file"], framework="pt", device="cpu")
    with opened as file:
        for name in collection.table_names:
            position, logical = collection.placement[name]
            table = fresh[position]
            names = ["rows", *((*(slot.name for slot in table.slots), STEP_SLOT) if with_state else ())]
            slices = {n: file.get_slice(f"{name}.{n}") for n in ("ids", *names)}
            where = f"table {name!r} in {folder / shard['file']}"
            _check_lengths(where, shard["rows"][name], {n: s.get_shape() for n, s in slices.items()}, table)
            start, stop = _row_range(file, name, shard["buckets"][0], span)
            ids = slices.pop("ids")[start:stop]
            _check_order(where, ids, span)
            for a in range(0, len(ids), ROWS_AT_ONCE):
                chunk = ids[a : a + ROWS_AT_ONCE]
                values = {n: s[start + a : start + a + len(chunk)] for n, s in slices.items()}
                tables = torch.full(chunk.shape, logical, dtype=torch.int32, device="cpu")
                table.write(tables, chunk, values.pop("rows"), values)


def _row_range(file: Any, name: str, first: int, span: tuple[int, int]) -> tuple[int, int]:
    """Return where the rows of buckets [span) begin and end in a shard that begins with bucket `first`."""
    if f"{name}.bucket_offsets" in file.keys():  # noqa: SIM118 (not a dict)
        offsets = file.get_tensor(f"{name}.bucket_offsets")
        return int(offsets[span[0] - first]), int(offsets[span[1] - first])
    buckets = bucket(file.get_tensor(f"{name}.ids"))
    start, stop = torch.searchsorted(buckets, torch.tensor(span, dtype=torch.int64)).tolist()
    return start, stop


def _check_lengths(where: str, rows: int, shapes: Mapping[str, list[int]], table: PhysicalTable) -> None:
    expected = {"ids": [rows], "rows": [rows, table.dim], STEP_SLOT: [rows]} | {
        s.name: [rows, s.width] for s in table.slots
    }
    for name, shape in shapes.items():
        if list(shape) != expected[name]:
            raise ValueError(f"{name!r} of {where} has shape {list(shape)}, it should have {expected[name]}")


def _check_order(where: str, ids: Tensor, span: tuple[int, int]) -> None:
    """Raise ValueError unless ids are of buckets [span) and sorted by (bucket, id) without repetition."""
    found = bucket(ids)
    step = found[1:] - found[:-1]
    sorted_once = ((step > 0) | ((step == 0) & (ids[1:] > ids[:-1]))).all()
    inside = len(ids) == 0 or (int(found[0]) >= span[0] and int(found[-1]) < span[1])
    if not sorted_once or not inside:
        raise ValueError(f"{where} is damaged: ids are repeated, out of order or in the wrong shard")
