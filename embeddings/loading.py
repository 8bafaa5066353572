"""Reading tables from shards: each rank reads the buckets that it owns, a chunk ahead of their insertion."""

import contextlib
import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import TableConfig
from .hashing import HASH_VERSION, NUM_BUCKETS, bucket, bucket_range
from .index import describe_optimizer, read_index, shard_files
from .kernels import Slot
from .policy_files import NO_POLICIES, SIDE_COLUMNS, restore_policy_state, used_now, wanted_sides
from .shards import IDS, OFFSETS, Column, column_bytes, column_shape
from .shared_rows import SHARED_FILE, load_shared
from .table import PhysicalTable
from .tensor_file import TensorFile
from .use import LAST_USE

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection

logger = logging.getLogger(__name__)

_STORED_ROWS = (torch.float32, torch.bfloat16)
CHUNK_BYTES = 32 << 20  # read at a time; two chunks are in memory


def load_tables(
    collection: "DynamicEmbeddingCollection",
    folder: str | os.PathLike[str],
    *,
    state: bool | None = None,
    tables: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Replace the rows of tables by those of a folder; each rank reads the rows that it owns. Collective.

    On an error the tables stay as they were, on every rank.

    Args:
        collection: tables with the configs that were saved.
        folder: written by `save_tables` on any number of ranks.
        state: load the optimizer state: True, False (rows start with fresh state), or None for "if there is one".
        tables: load these tables of the collection only, others lose their rows; default: all, and the folder has
            no others. For a warm start; a seed or initial values that differ are then only a warning.
        rename: table of the collection -> its name in the files, where that is another one.

    Example:
        load_tables(collection, "export", state=False, tables=["item"], rename={"item": "video"})

    Raises:
        ValueError: on every rank, when the folder does not fit (tables, widths, initial values, seed, hash, optimizer;
            both sides are named) or is damaged.
    """
    exchange = collection.exchange
    fresh: list[PhysicalTable] = []
    sides: dict[str, tuple[PhysicalTable, int]] = {}
    problem: Exception | None = None
    try:
        index = read_index(folder)
        metadata = index["metadata"]
        names = saved_names(collection, metadata, tables, rename)
        num_rows = {ours: metadata["rows"][name] for ours, name in names.items()}
        with_state = check_metadata(collection, metadata, state, names, warm=tables is not None)
        fresh = _empty_tables(collection, metadata, with_state)
        first, end = bucket_range(exchange.rank, exchange.world_size)
        _reserve(collection, fresh, num_rows, end - first)
        policies = (metadata.get("policies") if with_state else None) or NO_POLICIES
        if tables is not None or rename:  # a warm start: what the policies of the other run remember stays behind
            policies = policies | {"side_rows": {}, "dropped": {}}
        clock = int(policies["clock"]) if with_state else collection.clock
        sides = wanted_sides(collection, fresh, policies)
        for name, shard in zip(shard_files(index), metadata["shards"], strict=False):
            span = max(first, shard["buckets"][0]), min(end, shard["buckets"][1])
            if span[0] < span[1]:
                with TensorFile(Path(folder) / name) as file:
                    _load_shard(collection, fresh, file, shard, span, names, with_state, clock)
                    _load_sides(sides, file, shard["buckets"], span)
        if metadata.get("shared_rows"):
            load_shared(collection, fresh, Path(folder) / SHARED_FILE, names, state=with_state)
    except MemoryError as error:
        problem = error
    except Exception as error:
        problem = error if isinstance(error, ValueError) else ValueError(f"cannot load tables from {folder}: {error!r}")
    exchange.agree(problem)
    for name, expected in num_rows.items():
        position, logical = collection.places[name]
        if (found := exchange.sum_int(fresh[position].num_rows(logical))) != expected:
            raise ValueError(f"table {name!r} in {folder} should have {expected} rows, its shards hold {found}")
    for name, (table, logical) in sides.items():
        expected = policies["side_rows"][name]
        if (found := exchange.sum_int(table.num_rows(logical))) != expected:
            raise ValueError(f"table {name!r} in {folder} should have {expected} entries, its shards hold {found}")
    if with_state:
        restore_policy_state(collection, fresh, policies)
    collection.replace_physical(fresh)


def saved_names(
    collection: "DynamicEmbeddingCollection",
    metadata: Mapping[str, Any],
    tables: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return table of the collection -> name in the files, of the tables to load; see `load_tables`."""
    saved = [config["name"] for config in metadata["tables"]]
    rename = dict(rename or {})
    wanted = collection.table_names if tables is None else list(tables)
    if unknown := sorted({*wanted, *rename} - set(collection.table_names)):
        raise ValueError(f"no tables {unknown} to load: this collection has {sorted(collection.table_names)}")
    names = {ours: rename.get(ours, ours) for ours in wanted}
    missing = sorted(set(names.values()) - set(saved))
    left_out = [] if tables is not None else sorted(set(saved) - set(names.values()))
    if missing or left_out:
        raise ValueError(
            f"tables: the files have {sorted(saved)!r}, this collection has {sorted(collection.tables)!r}: to load "
            "some of them, or under other names, pass tables=[...] and rename={ours: theirs}"
        )
    return names


def check_metadata(
    collection: "DynamicEmbeddingCollection",
    metadata: Mapping[str, Any],
    state: bool | None,
    names: Mapping[str, str],
    *,
    warm: bool = False,
) -> bool:
    """Raise ValueError where files and collection differ; return whether to load the state.

    In a warm start what says how new rows begin (seed, initial values) may differ: that is a warning.
    """
    saved = {config["name"]: TableConfig.from_dict(config) for config in metadata["tables"]}
    pairs: list[tuple[str, Any, Any]] = [
        ("hash version", metadata["hash_version"], HASH_VERSION),
        ("number of buckets", metadata["num_buckets"], NUM_BUCKETS),
    ]
    births: list[tuple[str, Any, Any]] = [("seed", metadata["seed"], collection.seed)]
    for name, theirs_name in names.items():
        theirs, ours = saved[theirs_name], collection.tables[name]
        for field in ("embedding_dim", "initializer", "init_key", "row_dtype"):
            into = pairs if field == "embedding_dim" else births
            into.append((f"{field} of table {name!r}", getattr(theirs, field), getattr(ours, field)))
    for what, other, own in pairs if warm else pairs + births:
        if other != own:
            raise ValueError(f"{what}: the files have {other!r}, this collection has {own!r}")
    for what, other, own in births if warm else []:
        if other != own:
            logger.warning("%s: the files have %r, this collection goes on with %r", what, other, own)
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
    collection: "DynamicEmbeddingCollection", fresh: list[PhysicalTable], rows: Mapping[str, int], buckets: int
) -> None:
    """Make room for this rank's share of the rows before the first one is read."""
    needed = [0] * len(fresh)
    for name, count in rows.items():
        needed[collection.places[name][0]] += count * buckets // NUM_BUCKETS
    for table, count in zip(fresh, needed, strict=True):
        table.reserve(count)


def _load_shard(
    collection: "DynamicEmbeddingCollection",
    fresh: list[PhysicalTable],
    file: TensorFile,
    shard: Mapping[str, Any],
    span: tuple[int, int],
    names: Mapping[str, str],
    with_state: bool,
    clock: int,
) -> None:
    """Read the rows of buckets [span) of one shard into fresh tables."""
    for ours, name in names.items():
        position, logical = collection.places[ours]
        table = fresh[position]
        columns = table.columns(state=with_state)
        has_use = with_state and f"{name}.{LAST_USE}" in file.tensors
        if not has_use:  # saved before the table had policies, or without state
            columns = {column: kind for column, kind in columns.items() if column not in SIDE_COLUMNS}
        columns = {IDS: (torch.int64, 0), **columns}
        check_columns(f"table {name!r} in {file.path}", file, name, columns, shard["rows"][name])
        for ids, values in _read_rows(file, name, columns, shard["buckets"], span):
            tables = torch.full(ids.shape, logical, dtype=torch.int32, device="cpu")
            use = {} if has_use else used_now(ids, clock)
            table.write(tables, ids, values.pop("rows").to(columns["rows"][0]), values | use)


def _load_sides(
    sides: Mapping[str, tuple[PhysicalTable, int]], file: TensorFile, buckets: tuple[int, int], span: tuple[int, int]
) -> None:
    """Read what policies remember of ids in buckets [span)."""
    columns = {IDS: (torch.int64, 0), **SIDE_COLUMNS}
    for name, (table, logical) in sides.items():
        check_columns(f"table {name!r} in {file.path}", file, name, columns, file[f"{name}.{IDS}"].shape[0])
        for ids, values in _read_rows(file, name, columns, buckets, span):
            table.write(torch.full(ids.shape, logical, dtype=torch.int32, device="cpu"), ids, None, values)


def _read_rows(
    file: TensorFile, name: str, columns: Mapping[str, Column], buckets: tuple[int, int], span: tuple[int, int]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield ids and columns of the rows in buckets [span) of a shard of `buckets`, chunk by chunk, checked."""
    start, stop = _row_range(file, name, buckets, span)
    order = OrderCheck(f"table {name!r} in {file.path}", span)
    with contextlib.closing(_read_chunks(file, name, columns, start, stop)) as chunks:
        for values in chunks:
            ids = values.pop(IDS)
            order.check(ids)
            yield ids, values


def check_columns(where: str, file: TensorFile, name: str, columns: Mapping[str, Column], rows: int) -> None:
    """Raise ValueError unless a file has the columns of a table with so many rows; rows may be bfloat16."""
    for column, kind in columns.items():
        found, expected = file[f"{name}.{column}"], column_shape(kind, rows)
        if found.shape != expected:
            raise ValueError(f"{column!r} of {where} has shape {list(found.shape)}, it should have {list(expected)}")
        if found.dtype != kind[0] and not (column == "rows" and found.dtype in _STORED_ROWS):
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
