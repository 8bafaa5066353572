"""Writing all tables into shards: every rank writes files at the same time, streaming, without a copy of the table."""

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .config import ROW_DTYPES, TableConfig
from .files import BLOCK, Fingerprint, flush, write_text
from .hashing import HASH_VERSION, NUM_BUCKETS
from .index import FORMAT_VERSION, INDEX_NAME, describe_optimizer, remove_index, shard_files
from .policy_files import SIDE_COLUMNS, filled_sides, policy_state, side_name
from .shards import Column, Shard, ShardedRows, ShardPlan, plan_shards, write_pieces
from .shared_rows import SHARED_FILE, shared_tensors
from .table import PhysicalTable
from .tensor_file import TensorFileWriter, save_tensors

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection
    from .exchange import Exchange

T = TypeVar("T")


def save_tables(
    collection: "DynamicEmbeddingCollection",
    folder: str | os.PathLike[str],
    *,
    state: bool,
    max_shard_bytes: int = 2 << 30,
    row_dtype: str | None = None,
) -> dict[str, Fingerprint]:
    """Write all tables into a folder that every rank can reach (made when missing). Collective.

    An index that is there goes first; each file, and the new index last, appears under its name when it is complete.
    Shards of an earlier save in the folder go. Beside the tables this takes 16 bytes per row for the order of the rows,
    and a few blocks of 4 MiB.

    Args:
        collection: the tables.
        folder: where to.
        state: whether to write the optimizer state and the step of each row.
        max_shard_bytes: bound of the rows in one file (one bucket is never cut).
        row_dtype: of the rows in the files, "float32" or "bfloat16", without state; default: that of each table.

    Returns:
        Sizes and checksums of the files that this rank wrote.

    Raises:
        ValueError: state without an attached optimizer, or with another row_dtype, or while a step of training waits.
        OSError or RuntimeError: on every rank, when a file could not be written.
    """
    exchange, path = collection.exchange, Path(folder)
    if state and collection.optimizer is None:
        raise ValueError("state=True saves the state of a sparse optimizer, and none is attached to the tables")
    if row_dtype is not None and (state or row_dtype not in ROW_DTYPES):
        raise ValueError(
            f"row_dtype must be one of {ROW_DTYPES} and without state, got {row_dtype!r} with state={state}"
        )
    if state:
        check_between_steps(collection)
    row_sets = _row_sets(collection, state, row_dtype)
    weights = torch.stack([torch.diff(rows.offsets) * rows.row_bytes() for rows in row_sets])
    shards = plan_shards(weights.sum(0), max_shard_bytes)
    failures = _Failures()
    failures.attempt(lambda: _start(path, exchange.rank))
    exchange.agree(failures.first)
    files: dict[str, Fingerprint] = {}
    for turn in _turns(shards, exchange.world_size):
        plans = [_plan(shard, row_sets, rank, exchange.world_size) for rank, shard in enumerate(turn)]
        files |= _write_shard(plans, exchange, path, failures)
    shared = shared_tensors(collection, state=state)
    if shared and exchange.rank == 0:
        files |= failures.attempt(lambda: {SHARED_FILE: save_tensors(path / SHARED_FILE, shared)}) or {}
    exchange.agree(failures.first)
    metadata = _metadata(collection, row_sets, shards, state=state)
    index = {"metadata": metadata | {"fingerprints": of_all_ranks(exchange, files)}}
    if exchange.rank == 0:
        files |= failures.attempt(lambda: _publish(path, index)) or {}
    exchange.agree(failures.first)
    return files


def check_between_steps(collection: "DynamicEmbeddingCollection") -> None:
    """Raise ValueError, on every rank, when a step has been prepared for training and not applied. Collective.

    The rows and counts that it has brought would be saved, and brought again when the resumed run comes to it.
    """
    waiting = any(step.inserts and not step.is_fetched for step in collection.steps)
    pending = () if collection.optimizer is None else collection.optimizer.pending
    problem = None
    if waiting or any(step.touched for step in pending):
        problem = ValueError(
            "a step was prepared for training and not applied: its new rows and counts would be in the checkpoint and "
            "come again after a resume: save after optimizer.step() and before the next prepare, or drop the step"
        )
    collection.exchange.agree(problem)


def _start(path: Path, rank: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        remove_index(path)


class _Failures:
    """The first exception of this rank; the others must hear of it at the next agreement, not in a collective."""

    first: Exception | None = None

    def attempt(self, action: Callable[[], T]) -> T | None:
        """The result of an action, or None after a failure, of it or of an earlier one."""
        if self.first is None:
            try:
                return action()
            except Exception as error:
                self.first = error
        return None


def _row_sets(collection: "DynamicEmbeddingCollection", state: bool, row_dtype: str | None) -> list[ShardedRows]:
    """What goes into the files, with the rows of all ranks counted. Collective."""
    exchange, failures = collection.exchange, _Failures()
    sides = filled_sides(collection) if state else []

    def row_sets() -> list[ShardedRows]:
        tables = [_table_rows(collection, name, state, row_dtype) for name in collection.table_names]
        return tables + [_side_rows(collection, name, side) for name, side in sides]

    found = failures.attempt(row_sets)
    exchange.agree(failures.first)
    assert found is not None
    counts = exchange.sum_tensor(torch.stack([rows.local_rows_per_bucket for rows in found]))
    for rows, count in zip(found, counts, strict=True):
        rows.set_rows_per_bucket(count)
    return found


def _table_rows(collection: "DynamicEmbeddingCollection", name: str, state: bool, row_dtype: str | None) -> ShardedRows:
    position, logical = collection.places[name]
    table = collection.physical[position]
    columns = table.columns(state=state)
    if row_dtype is not None:
        columns["rows"] = (getattr(torch, row_dtype), table.dim)
    return _sharded(name, table, logical, columns)


def _side_rows(collection: "DynamicEmbeddingCollection", name: str, side: str) -> ShardedRows:
    position, logical = collection.places[name]
    return _sharded(side_name(name, side), collection.physical[position].side_table(side), logical, SIDE_COLUMNS)


def _sharded(name: str, table: PhysicalTable, logical: int, columns: Mapping[str, Column]) -> ShardedRows:
    ids, handles = table.sorted_keys(logical)

    def read(column: str, start: int, stop: int, out: Tensor) -> None:
        table.read_column(column, handles[start:stop], out)

    return ShardedRows(name, ids, columns, read)


def _turns(shards: list[Shard], world_size: int) -> list[list[Shard | None]]:
    """Who writes what: turns in which each rank writes at most one shard, one of those whose first bucket it owns."""
    queues: list[list[Shard]] = [[] for _ in range(world_size)]
    for shard in shards:
        queues[shard.first * world_size // NUM_BUCKETS].append(shard)
    longest = max(map(len, queues))
    return [[queue[i] if i < len(queue) else None for queue in queues] for i in range(longest)]


def _plan(shard: Shard | None, row_sets: list[ShardedRows], writer: int, world_size: int) -> ShardPlan | None:
    if shard is None:
        return None
    return ShardPlan(shard, row_sets, writer=writer, world_size=world_size, piece_bytes=BLOCK)


def _write_shard(
    plans: list[ShardPlan | None], exchange: "Exchange", folder: Path, failures: _Failures
) -> dict[str, Fingerprint]:
    """Write this rank's shard of a turn and send what the others need for theirs. Collective."""
    mine = plans[exchange.rank]
    writer = None
    if mine is not None:
        writer = failures.attempt(partial(TensorFileWriter, folder / mine.shard.file, mine.layout))
    write_pieces(plans, exchange, writer, failures.attempt)  # after a failure only the collectives go on
    if mine is None or writer is None:
        return {}
    if failures.first is not None:
        writer.close(failures.first)
        return {}
    failures.attempt(writer.close)
    return {mine.shard.file: writer.fingerprint}


def of_all_ranks(exchange: "Exchange", files: Mapping[str, Fingerprint]) -> dict[str, Fingerprint]:
    """Return the sizes and checksums of the files that any rank wrote, by name. Collective."""
    merged: dict[str, Fingerprint] = {}
    for part in exchange.gather_ints(list(json.dumps(files).encode())):
        merged |= json.loads(bytes(part))
    return dict(sorted(merged.items()))


def _publish(folder: Path, index: Mapping[str, Any]) -> dict[str, Fingerprint]:
    fingerprint = write_text(folder / INDEX_NAME, json.dumps(index, indent=2))
    written = {*folder.glob("embeddings-*-of-*.safetensors"), *folder.glob(SHARED_FILE)}
    for stale in written - {folder / name for name in shard_files(index)}:
        stale.unlink()
    flush(folder)
    return {INDEX_NAME: fingerprint}


def _placeless(config: TableConfig) -> dict[str, Any]:
    """A table as the files know it: wherever its rows were, they may go anywhere."""
    return {field: value for field, value in config.to_dict().items() if field != "placement"}


def _metadata(
    collection: "DynamicEmbeddingCollection", row_sets: list[ShardedRows], shards: list[Shard], *, state: bool
) -> dict[str, Any]:
    optimizer = collection.optimizer
    tables = [rows for rows in row_sets if rows.name in collection.tables]
    sides = {rows.name: rows.count(0, NUM_BUCKETS) for rows in row_sets if rows.name not in collection.tables}
    return {
        "format_version": FORMAT_VERSION,
        "hash_version": HASH_VERSION,
        "num_buckets": NUM_BUCKETS,
        "seed": collection.seed,
        "tables": [_placeless(config) for config in collection.tables.values()],
        "optimizer": describe_optimizer(type(optimizer).__name__, collection.physical[0]) if state else None,
        "rows": {rows.name: rows.count(0, NUM_BUCKETS) for rows in tables},
        "policies": policy_state(collection, sides) if state else None,
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
