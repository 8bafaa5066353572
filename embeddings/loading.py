"""Reading tables from shards: each rank reads the buckets that it owns, some blocks ahead of their insertion."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import TableConfig
from .files import DamagedFile, Fingerprint, fingerprint
from .hashing import HASH_VERSION, NUM_BUCKETS, bucket, bucket_range
from .index import describe_optimizer, read_index, shard_files
from .kernels import STEP_SLOT, Slot
from .kernels.base import check_steps
from .policy_files import NO_POLICIES, SIDE_COLUMNS, restore_policy_state, wanted_sides
from .shards import IDS, OFFSETS, Column, column_shape
from .shared_rows import SHARED_FILE, load_shared
from .table import PhysicalTable
from .tensor_file import TensorFile
from .use import LAST_USE

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection
    from .exchange import Exchange

logger = logging.getLogger(__name__)

_STORED_ROWS = (torch.float32, torch.bfloat16)


def load_tables(
    collection: "DynamicEmbeddingCollection",
    folder: str | os.PathLike[str],
    *,
    state: bool | None = None,
    tables: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    fingerprints: Mapping[str, Fingerprint] | None = None,
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
        fingerprints: of the files, to compare those on the way that one rank reads from end to end, `whole_shards`;
            others must have been compared before. Default: those in the index of an export, all of which are compared,
            shards that several ranks read by one of them (the ranks are taken to see the same files).

    Example:
        load_tables(collection, "export", state=False, tables=["item"], rename={"item": "video"})

    Raises:
        ValueError: on every rank, when the folder does not fit (tables, widths, initial values, seed, hash, optimizer;
            both sides are named) or is damaged. With fingerprints that is a DamagedFile, on a rank that has met it.
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
        if fingerprints is None and metadata["optimizer"] is None:  # else much would be read that is not wanted
            fingerprints = metadata.get("fingerprints")
            if fingerprints is not None:
                _check_divided(Path(folder), metadata, fingerprints, exchange)
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
            if span[0] >= span[1]:
                continue
            expected = None
            if fingerprints is not None and span == tuple(shard["buckets"]):
                expected = fingerprints[name]
            with _naming_damage(fingerprints is not None), TensorFile(Path(folder) / name) as file:
                targets = [
                    _table_target(file, theirs, fresh[position], logical, with_state, clock)
                    for theirs, (position, logical) in ((names[ours], collection.places[ours]) for ours in names)
                ]
                targets += [_Target(side, *place, dict(SIDE_COLUMNS)) for side, place in sides.items()]
                _load_shard(targets, file, shard, span, expected)
        if metadata.get("shared_rows"):
            if fingerprints is not None:
                _check_file(Path(folder), SHARED_FILE, fingerprints)
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


@contextlib.contextmanager
def _naming_damage(is_sealed: bool) -> Iterator[None]:
    """Where files are known to have been right, what is wrong with one is damage."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, DamagedFile) or not is_sealed:
            raise
        raise DamagedFile(str(error)) from error


def whole_shards(metadata: Mapping[str, Any], world_size: int) -> set[str]:
    """Return the shards of an index that one of so many ranks reads from end to end."""
    ranges = [bucket_range(rank, world_size) for rank in range(world_size)]
    return {
        shard["file"]
        for shard in metadata["shards"]
        if any(first <= shard["buckets"][0] and shard["buckets"][1] <= end for first, end in ranges)
    }


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

    Rows may have another precision: they are converted, with a warning. In a warm start what says how new rows begin
    (seed, initial values) may differ too.
    """
    saved = {config["name"]: TableConfig.from_dict(config) for config in metadata["tables"]}
    pairs: list[tuple[str, Any, Any]] = [
        ("hash version", metadata["hash_version"], HASH_VERSION),
        ("number of buckets", metadata["num_buckets"], NUM_BUCKETS),
    ]
    births: list[tuple[str, Any, Any]] = [("seed", metadata["seed"], collection.seed)]
    precisions: list[tuple[str, Any, Any]] = []
    kinds = {"embedding_dim": pairs, "initializer": births, "init_key": births, "row_dtype": precisions}
    for name, theirs_name in names.items():
        theirs, ours = saved[theirs_name], collection.tables[name]
        for key, into in kinds.items():
            into.append((f"{key} of table {name!r}", getattr(theirs, key), getattr(ours, key)))
    for what, other, own in pairs if warm else pairs + births:
        if other != own:
            raise ValueError(f"{what}: the files have {other!r}, this collection has {own!r}")
    for what, other, own in precisions + births if warm else precisions:
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


@dataclass
class _Target:
    """The rows of a table in a shard, and where they go."""

    name: str  # in the file
    table: PhysicalTable
    logical: int
    columns: dict[str, Column]  # in the file, beside the ids
    rows: tuple[int, int] = (0, 0)  # those in this rank's buckets
    clock: int = 0  # when rows count as used last where the file does not say
    handles: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))

    def insert(self, ids: Tensor, at: int) -> None:
        """Make rows for ids, which are `at` and following in the shard; what the file does not have starts anew."""
        handles = self.table.insert_blank(self.logical, ids)
        self.handles[at - self.rows[0] :][: len(ids)] = handles
        for column in self.table.columns(state=True):
            if column not in self.columns:
                self.table.fill_column(column, handles, float(self.clock) if column == LAST_USE else None)

    def write(self, column: str, values: Tensor, at: int) -> None:
        """Fill a column of the rows `at` and following of the shard."""
        if column == STEP_SLOT:
            check_steps(f"table {self.name!r} in the files", values)
        start = at - self.rows[0]
        self.table.write_column(column, self.handles[start : start + len(values)], values)


def _load_shard(
    targets: Sequence[_Target],
    file: TensorFile,
    shard: Mapping[str, Any],
    span: tuple[int, int],
    expected: Fingerprint | None,
) -> None:
    """Read the rows of buckets [span) of one shard in the order of the file; all of it when that is `expected`."""
    wanted: dict[str, list[tuple[_Target, str]]] = {}  # several tables may start from one of the file
    order: dict[str, OrderCheck] = {}
    ranges: dict[str, tuple[int, int]] = {}
    for target in targets:
        where = f"table {target.name!r} in {file.path}"
        rows = shard["rows"].get(target.name, file[f"{target.name}.{IDS}"].shape[0])
        columns = {IDS: (torch.int64, 0), **target.columns}
        check_columns(where, file, target.name, columns, rows)
        if min(columns, key=lambda column: file[f"{target.name}.{column}"].begin) != IDS:  # noqa: B023
            raise ValueError(f"{where} has its ids behind other columns, where grzoo does not put them: save it again")
        target.rows = start, stop = _row_range(file, target.name, shard["buckets"], span)
        target.handles = torch.empty(stop - start, dtype=torch.int64, device="cpu")
        order[target.name] = OrderCheck(where, span)
        for column in columns:
            wanted.setdefault(f"{target.name}.{column}", []).append((target, column))
        ranges |= {f"{target.name}.{column}": (start, stop) for column in columns}
    with contextlib.closing(file.stream(ranges, expected)) as pieces:
        for name, at, values in pieces:
            if name.endswith(f".{IDS}"):
                order[wanted[name][0][0].name].check(values)
            for target, column in wanted[name]:
                if column == IDS:
                    target.insert(values, at)
                else:
                    target.write(column, values, at)


def _check_divided(
    folder: Path, metadata: Mapping[str, Any], fingerprints: Mapping[str, Fingerprint], exchange: "Exchange"
) -> None:
    """Compare the shards that no rank reads from end to end, each on one of the ranks."""
    divided = {shard["file"] for shard in metadata["shards"]} - whole_shards(metadata, exchange.world_size)
    for name in sorted(divided)[exchange.rank :: exchange.world_size]:
        _check_file(folder, name, fingerprints)


def _check_file(folder: Path, name: str, fingerprints: Mapping[str, Fingerprint]) -> None:
    if fingerprint(folder / name) != fingerprints.get(name):
        raise DamagedFile(f"{folder} is damaged: the checksum of {name} is wrong")


def _table_target(
    file: TensorFile, name: str, table: PhysicalTable, logical: int, with_state: bool, clock: int
) -> _Target:
    columns = table.columns(state=with_state)
    if not with_state or f"{name}.{LAST_USE}" not in file.tensors:  # without state, or before the table had policies
        columns = {column: kind for column, kind in columns.items() if column not in SIDE_COLUMNS}
    return _Target(name, table, logical, columns, clock=clock)


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
