"""Reading tables from shards: each rank reads the buckets that it owns, a chunk ahead of their insertion."""

import contextlib
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import TableConfig
from .hashing import HASH_VERSION, NUM_BUCKETS, bucket, bucket_range
from .index import describe_optimizer, read_index, shard_files
from .kernels import Slot
from .shards import IDS, OFFSETS, Column, column_bytes, column_shape
from .shared_rows import SHARED_FILE, load_shared
from .table import PhysicalTable
from .tensor_file import TensorFile

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection

ROW_DTYPES = (torch.float32, torch.bfloat16)
CHUNK_BYTES = 32 << 20  # read at a time; two chunks are in memory


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
            both sides are named) or is damaged.
    """
    exchange = collection.exchange
    fresh: list[PhysicalTable] = []
    problem: Exception | None = None
    try:
        index = read_index(folder)
        metadata = index["metadata"]
        num_rows = dict(metadata["rows"])
        with_state = check_metadata(collection, metadata, state)
        fresh = _empty_tables(collection, metadata, with_state)
        first, end = bucket_range(exchange.rank, exchange.world_size)
        _reserve(collection, fresh, metadata["rows"], (end - first) / NUM_BUCKETS)
        for name, shard in zip(shard_files(index), metadata["shards"], strict=False):
            span = max(first, shard["buckets"][0]), min(end, shard["buckets"][1])
            if span[0] < span[1]:
                _load_shard(collection, fresh, Path(folder) / name, shard, span, with_state)
        if metadata.get("shared_rows"):
            load_shared(collection, fresh, Path(folder) / SHARED_FILE, state=with_state)
    except MemoryError as error:
        problem = error
    except Exception as error:
        problem = error if isinstance(error, ValueError) else ValueError(f"cannot load tables from {folder}: {error!r}")
    exchange.agree(problem)
    for name, expected in num_rows.items():
        position, logical = collection.placement[name]
        if (found := exchange.sum_int(fresh[position].num_rows(logical))) != expected:
            raise ValueError(f"table {name!r} in {folder} should have {expected} rows, its shards hold {found}")
    collection.replace_physical(fresh)


def check_metadata(collection: "DynamicEmbeddingCollection", metadata: Mapping[str, Any], state: bool | None) -> bool:
    """Raise ValueError where files and collection differ; return whether to load the state."""
    saved = {config["name"]: TableConfig.from_dict(config) for config in metadata["tables"]}
    pairs: list[tuple[str, Any, Any]] = [
        ("hash version", metadata["hash_version"], HASH_VERSION),
        ("number of buckets", metadata["num_buckets"], NUM_BUCKETS),
        ("seed", metadata["seed"], collection.seed),
        ("tables", sorted(saved), sorted(collection.tables)),
    ]
    for name, config in collection.tables.items():
        for field in ("embedding_dim", "initializer", "init_key", "row_dtype"):
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
        ours = describe_optimizer(type(optimizer).__name__, collection.physical[0])
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


def _reserve(
    collection: "DynamicEmbeddingCollection", fresh: list[PhysicalTable], rows: Mapping[str, int], share: float
) -> None:
    """Make room for this rank's share of the rows before the first one is read."""
    needed = [0] * len(fresh)
    for name, count in rows.items():
        needed[collection.placement[name][0]] += int(count * share)
    for table, count in zip(fresh, needed, strict=True):
        table.reserve(count)


def _load_shard(
    collection: "DynamicEmbeddingCollection",
    fresh: list[PhysicalTable],
    path: Path,
    shard: Mapping[str, Any],
    span: tuple[int, int],
    with_state: bool,
) -> None:
    """Read the rows of buckets [span) of one shard into fresh tables."""
    with TensorFile(path) as file:
        for name in collection.table_names:
            position, logical = collection.placement[name]
            table = fresh[position]
            where = f"table {name!r} in {path}"
            columns = {IDS: (torch.int64, 0), **table.columns(state=with_state)}
            check_columns(where, file, name, columns, shard["rows"][name])
            start, stop = _row_range(file, name, shard["buckets"], span)
            order = OrderCheck(where, span)
            with contextlib.closing(_read_chunks(file, name, columns, start, stop)) as chunks:
                for values in chunks:
                    ids = values.pop(IDS)
                    order.check(ids)
                    tables = torch.full(ids.shape, logical, dtype=torch.int32, device="cpu")
                    table.write(tables, ids, values.pop("rows").to(columns["rows"][0]), values)


def check_columns(where: str, file: TensorFile, name: str, columns: Mapping[str, Column], rows: int) -> None:
    """Raise ValueError unless a file has the columns of a table with so many rows; rows may be bfloat16."""
    for column, kind in columns.items():
        found, expected = file[f"{name}.{column}"], column_shape(kind, rows)
        if found.shape != expected:
            raise ValueError(f"{column!r} of {where} has shape {list(found.shape)}, it should have {list(expected)}")
        if found.dtype != kind[0] and not (column == "rows" and found.dtype in ROW_DTYPES):
            raise ValueError(f"{column!r} of {where} is {found.dtype}, it should be {kind[0]}")


def _row_range(file: TensorFile, name: str, buckets: Sequence[int], span: tuple[int, int]) -> tuple[int, int]:
    """Return where the rows of buckets [span) begin and end in a shard of `buckets`."""
    if f"{name}.{OFFSETS}" not in file.tensors:  # written by an early version
        found = bucket(file.read(f"{name}.{IDS}"))
        start, stop = torch.searchsorted(found, torch.tensor(span, dtype=torch.int64)).tolist()
        return start, stop
    offsets = read_offsets(file, name, buckets)
    return int(offsets[span[0] - buckets[0]]), int(offsets[span[1] - buckets[0]])


def read_offsets(file: TensorFile, name: str, buckets: Sequence[int]) -> Tensor:
    """Return where each of the buckets [first, end) begins, int64 [buckets + 1]; ValueError when that cannot be."""
    rows = file[f"{name}.{IDS}"].shape[0]
    offsets = file.read(f"{name}.{OFFSETS}")
    is_shaped = offsets.dtype == torch.int64 and offsets.shape == (buckets[1] - buckets[0] + 1,)
    if not is_shaped or int(offsets[0]) != 0 or int(offsets[-1]) != rows or (torch.diff(offsets) < 0).any():
        raise ValueError(f"{name}.{OFFSETS} in {file.path} is damaged: it should lead from 0 to {rows} rows")
    return offsets


def _read_chunks(
    file: TensorFile, name: str, columns: Mapping[str, Column], start: int, stop: int
) -> Generator[dict[str, Tensor]]:
    """Yield rows [start, stop) in chunks, column -> values; the next chunk is read by a thread meanwhile.

    The values of a chunk last until the next one is asked for: two sets of buffers take turns.
    """
    rows = max(1, min(CHUNK_BYTES // sum(map(column_bytes, columns.values())), stop - start))
    stored = {column: file[f"{name}.{column}"] for column in columns}
    buffers = [
        {c: torch.empty(rows, *s.shape[1:], dtype=s.dtype, device="cpu") for c, s in stored.items()} for _ in range(2)
    ]

    def read(at: int) -> dict[str, Tensor]:
        end = min(at + rows, stop)
        target = buffers[(at - start) // rows % 2]
        return {column: file.read(f"{name}.{column}", at, end, target[column][: end - at]) for column in columns}

    with ThreadPoolExecutor(1) as thread:
        pending = [thread.submit(read, start)] if start < stop else []
        for at in range(start, stop, rows):
            values = pending.pop(0).result()
            if at + rows < stop:
                pending.append(thread.submit(read, at + rows))
            yield values


class OrderCheck:
    """Checks that the ids of a shard, chunk after chunk, are in its buckets and sorted by (bucket, id) once each."""

    def __init__(self, where: str, span: tuple[int, int]) -> None:
        self._where, self._span = where, span
        self._last: tuple[int, int] | None = None  # bucket and id before the chunk

    def check(self, ids: Tensor) -> None:
        """Take the next chunk, int64 [n]; ValueError where it is not in order."""
        if len(ids) == 0:
            return
        found = bucket(ids)
        step = torch.diff(found)
        is_sorted = bool(((step > 0) | ((step == 0) & (ids[1:] > ids[:-1]))).all())
        first, last = (int(found[0]), int(ids[0])), (int(found[-1]), int(ids[-1]))
        follows = self._last is None or self._last < first
        if not (is_sorted and follows and first[0] >= self._span[0] and last[0] < self._span[1]):
            raise ValueError(f"{self._where} is damaged: ids are repeated, out of order or in the wrong shard")
        self._last = last
