"""Deleting rows between steps: by `erase`, and by eviction; pins; the log of what was deleted. See README.md."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .hashing import owner
from .step import DELETED, NO_ROW
from .transfer import HOST
from .use import LAST_USE, as_slot, read_slot

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection
    from .step import Step
    from .table import PhysicalTable

LOG_ROWS = 1 << 20  # ids that the log of one physical table keeps on a rank


class Erased(NamedTuple):
    """What `erase` did, on all ranks."""

    rows: int  # deleted
    unknown: int  # distinct ids that had no row


class EvictedIds(NamedTuple):
    """Ids that lost their row on this rank, each with the last step after which it did."""

    ids: Tensor  # int64 [n], sorted by (bucket, id)
    steps: Tensor  # int64 [n]
    dropped: int  # older entries that the bounded log no longer has


def at_owners(collection: "DynamicEmbeddingCollection", table: str, ids: object) -> tuple["PhysicalTable", int, Tensor]:
    """Return a table, its position in it, and the distinct ids of all ranks that this rank owns. Collective.

    Raises ValueError, on every rank, for an unknown table or ids that are not int64.
    """
    exchange, problem = collection.exchange, None
    mine = torch.empty(0, dtype=torch.int64, device=HOST)
    try:
        collection.check_table(table)
        mine = _distinct(ids)
    except ValueError as error:
        problem = error
    exchange.agree(problem)
    where = owner(mine, exchange.world_size)
    sent = torch.bincount(where, minlength=exchange.world_size)[:, None]
    received = exchange.swap_counts(sent)
    (arrived,) = exchange.swap([mine[torch.argsort(where, stable=True)]], sent, received)
    position, logical = collection.places[table]
    physical = collection.physical[position]
    return physical, logical, torch.unique(arrived).to(physical.device)


def _distinct(ids: object) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        what = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"ids must be an int64 tensor, got {what}: convert with torch.as_tensor(ids).long()")
    return torch.unique(ids.detach().cpu())


def erase(collection: "DynamicEmbeddingCollection", table: str, ids: object) -> Erased:
    """See `DynamicEmbeddingCollection.erase`."""
    physical, logical, mine = at_owners(collection, table, ids)
    tables = _same_table(logical, mine)
    handles = physical.storage.find(tables, mine)
    known = handles >= 0
    problem: Exception | None = None
    try:
        delete_rows(collection, physical, tables[known], mine[known], handles[known])
        if "candidates" in physical.side:
            physical.side["candidates"].erase(tables, mine)
    except Exception as error:
        problem = error
    collection.exchange.agree(problem)
    collection.tally(table).erased += int(known.sum())
    numbers = collection.exchange.gather_ints([int(known.sum()), int((~known).sum())])
    rows, unknown = (sum(column) for column in zip(*numbers, strict=True))
    return Erased(rows, unknown)


def pin(collection: "DynamicEmbeddingCollection", table: str, ids: object, *, pinned: bool) -> None:
    """See `DynamicEmbeddingCollection.pin` and `unpin`."""
    physical, logical, mine = at_owners(collection, table, ids)
    tables = _same_table(logical, mine)
    if pinned:
        physical.side_table("pinned").lookup(tables, mine, insert=True)
    elif "pinned" in physical.side:
        physical.side["pinned"].erase(tables, mine)


def delete_rows(
    collection: "DynamicEmbeddingCollection", table: "PhysicalTable", tables: Tensor, ids: Tensor, handles: Tensor
) -> None:
    """Log rows of this rank, delete them, and make steps and gradients that know their handles forget them.

    Without memory for the log nothing is deleted.
    """
    if len(ids) == 0:
        return
    log = table.side_table("evicted")
    logged, _ = log.lookup(tables, ids, insert=True)
    log.storage.scatter(logged, None, {LAST_USE: as_slot(torch.full_like(ids, collection.clock))})
    table.erase(tables, ids)
    for step in collection.steps:
        _detach(step, table, handles)
    if collection.optimizer is not None:
        collection.optimizer.forget_rows(table, handles)
    if len(log) > LOG_ROWS:
        _drop_oldest_half(log)


def _detach(step: "Step", table: "PhysicalTable", handles: Tensor) -> None:
    """A handle may be given to another row: a step that outlives the row must not write there.

    In a step that has fetched the row, its gradient is nobody's; for one that has not, the id is now unknown.
    """
    for share in step.shares:
        if share.table is table:
            gone = torch.isin(share.handles, handles)
            if gone.any():
                share.handles = share.handles.masked_fill(gone, NO_ROW if share.leaf is None else DELETED)
                share.complete = False


def _drop_oldest_half(log: "PhysicalTable") -> None:
    tables, ids, handles = log.storage.keys()
    order = torch.argsort(read_slot(log.storage, LAST_USE, handles), stable=True)[: len(ids) // 2]
    lost = torch.bincount(tables[order], minlength=len(log.configs)).tolist()
    log.dropped = [before + n for before, n in zip(log.dropped, lost, strict=True)]
    log.erase(tables[order], ids[order])


def drain_evicted(collection: "DynamicEmbeddingCollection", table: str) -> EvictedIds:
    """See `DynamicEmbeddingCollection.drain_evicted`."""
    position, logical = collection.places[table]
    physical = collection.physical[position]
    physical.check_open()
    log = physical.side.get("evicted")
    if log is None:
        empty = torch.empty(0, dtype=torch.int64, device=HOST)
        return EvictedIds(empty, empty, 0)
    ids, handles = log.sorted_keys(logical)
    steps = read_slot(log.storage, LAST_USE, handles).long()
    log.erase(_same_table(logical, ids), ids)
    dropped, log.dropped[logical] = log.dropped[logical], 0
    return EvictedIds(ids, steps, dropped)


def _same_table(logical: int, ids: Tensor) -> Tensor:
    return torch.full(ids.shape, logical, dtype=torch.int32, device=ids.device)


def in_flight(steps: Sequence["Step"], table: "PhysicalTable") -> Tensor:
    """Return the handles int64 [n] of rows that steps have prepared and not yet applied."""
    handles = [share.handles for step in steps for share in step.shares if share.table is table]
    return torch.cat([torch.empty(0, dtype=torch.int64, device=table.device), *handles])
