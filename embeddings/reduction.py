"""Gradients of pending steps -> one summed gradient per owned row, the same on any number of ranks up to rounding."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kernels import functions_at
from .step import NO_ROW, Step, TableShare
from .table import PhysicalTable
from .transfer import HOST, move

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection


@dataclass
class RowGradients:
    """Gradients of the touched rows of one physical table on their owner, on the device of the table."""

    tables: Tensor  # int32 [n]: logical table inside the physical one
    handles: Tensor  # int64 [n], distinct
    grads: Tensor  # float32 [n, dim]
    keys: Tensor | None = None  # int64 [n], for the stochastic rounding of bfloat16 rows
    shared: "RowGradients | None" = None  # of the rows that ids without a row share: the same on all ranks


def agree_on_touched(collection: "DynamicEmbeddingCollection", steps: Sequence[Step]) -> dict[int, set[str]]:
    """Return, for the serial of each step that a backward pass reached on some rank, the tables it reached. Collective.

    Raises RuntimeError, on every rank, when a rank no longer holds a step that has gradients elsewhere.
    """
    if collection.exchange.world_size == 1:
        return {step.serial: set(step.touched) for step in steps if step.touched}
    names = collection.table_names
    words: list[int] = []  # per step: serial, number of touched tables, their positions
    for step in steps:
        words += [step.serial, len(step.touched), *sorted(names.index(name) for name in step.touched)]
    touched: dict[int, set[str]] = {}
    held: list[set[int]] = []
    for stream in map(iter, collection.exchange.gather_ints(words)):
        held.append(set())
        for serial in stream:
            held[-1].add(serial)
            for _ in range(next(stream)):
                touched.setdefault(serial, set()).add(names[next(stream)])
    if any(set(touched) - serials for serials in held):
        raise RuntimeError(
            "ranks disagree on the steps that wait for the optimizer: every rank must call prepare/fetch, backward,"
            " optimizer.step() and zero_grad() in the same order"
        )
    return touched


def reduce_gradients(
    collection: "DynamicEmbeddingCollection", steps: Sequence[Step], touched: dict[int, set[str]], scale: float
) -> list[RowGradients]:
    """Return scale * the sum over ranks and steps of the gradients of each owned row, per physical table. Collective.

    One all-to-all for all tables of all steps; one all-gather for each physical table with shared rows. Order of
    summation: each rank has summed over its own occurrences (in the leaf), the owner adds ranks in rank order, then
    steps in the order of their preparation; for a shared row each owner adds its ids and steps, then ranks in order.
    """
    exchange = collection.exchange
    active = [step for step in steps if step.serial in touched]
    if not active:
        return []
    parts = [_leaf_gradient(share) for step in active for share in step.shares]
    sent, received = active[0].sent, active[0].received
    if len(active) > 1:
        sent = torch.cat([step.sent for step in active], dim=1)
        received = torch.cat([step.received for step in active], dim=1)
    devices = [share.table.device for step in active for share in step.shares]
    incoming = iter(exchange.swap(parts, sent, received, devices))
    summed: list[list[RowGradients]] = [[] for _ in collection.physical]
    unknown: dict[int, list[Tensor]] = {p: [] for p, table in enumerate(collection.physical) if table.shared}
    for step in active:
        for p, share in enumerate(step.shares):
            reached = [config.name in touched[step.serial] for config in share.table.configs]
            grads = _sum_by_owned(share, next(incoming))
            if p in unknown:
                unknown[p].append(_sum_unknown(share, grads, reached))
            summed[p].append(_of_rows(share, grads, reached))
        step.statistics["bytes_sent"] += _bytes_sent(step, exchange.rank)
    reduced = [_sum_over_steps(share, s, scale) for share, s in zip(active[0].shares, summed, strict=True)]
    for p, sums in unknown.items():
        total = exchange.sum_rows(move([functools.reduce(torch.add, sums)], HOST)[0])
        reduced[p].shared = _of_shared(collection.physical[p], total, scale)
    return reduced


def _leaf_gradient(share: TableShare) -> Tensor:
    assert share.leaf is not None
    if share.leaf.grad is None:
        return torch.zeros(share.requested, share.table.dim, dtype=torch.float32, device=share.leaf.device)
    return share.leaf.grad


def _sum_by_owned(share: TableShare, grads: Tensor) -> Tensor:
    """Sum what arrived, float32 [R, dim], by owned pair."""
    if share.inverse is None:
        return grads
    return share.table.backend.segment_sum(grads, share.inverse, len(share.handles))


def _of_rows(share: TableShare, grads: Tensor, reached: Sequence[bool]) -> RowGradients:
    """Drop ids without a row and tables without a gradient."""
    tables, ids, handles = share.tables, share.ids, share.handles
    if not share.complete or not all(reached):
        keep = (handles >= 0) & _on(reached, handles)[tables.long()]
        tables, ids, handles, grads = tables[keep], ids[keep], handles[keep], grads[keep]
    return RowGradients(tables, handles, grads, share.table.row_keys(tables, ids))


def _on(flags: Sequence[bool], like: Tensor) -> Tensor:
    """Return flags as bool [n] beside a tensor."""
    return move([torch.tensor(flags, dtype=torch.bool, device=HOST)], like.device)[0]


def _sum_unknown(share: TableShare, grads: Tensor, reached: Sequence[bool]) -> Tensor:
    """Sum the gradients of ids without a row by table, float32 [tables, dim + 1]; the last column counts ids."""
    absent = (share.handles == NO_ROW) & _on(reached, share.handles)[share.tables.long()]
    tables = share.tables[absent].long()
    ones = torch.ones(len(tables), 1, dtype=torch.float32, device=tables.device)
    values = torch.cat([grads[absent], ones], dim=1)
    return share.table.backend.segment_sum(values, tables, len(share.table.configs))


def _of_shared(table: PhysicalTable, sums: Tensor, scale: float) -> RowGradients:
    """Gradients of the shared rows that some rank touched, from `_sum_unknown` of all ranks."""
    assert table.shared is not None
    tables = table.shared.tables[sums[table.shared.tables.long(), -1] > 0]
    grads = sums[tables.long(), :-1] * scale
    return RowGradients(tables, table.shared.handles(tables), grads, table.shared.keys(tables))


def _sum_over_steps(share: TableShare, steps: list[RowGradients], scale: float) -> RowGradients:
    if len(steps) == 1:
        grads = steps[0].grads if scale == 1.0 else steps[0].grads * scale
        return RowGradients(steps[0].tables, steps[0].handles, grads, steps[0].keys)
    handles = torch.cat([step.handles for step in steps])
    unique = share.table.backend.unique(handles)
    tables = torch.empty(len(unique.ids), dtype=torch.int32, device=handles.device)
    tables[unique.inverse] = torch.cat([step.tables for step in steps])
    keys = None
    if all_keys := [step.keys for step in steps if step.keys is not None]:
        keys = torch.empty_like(unique.ids)
        keys[unique.inverse] = torch.cat(all_keys)
    values = torch.cat([step.grads for step in steps])
    grads = share.table.backend.segment_sum(values, unique.inverse, len(unique.ids))
    return RowGradients(tables, unique.ids, grads * scale, keys)


def _bytes_sent(step: Step, rank: int) -> int:
    if len(step.sent) == 1:
        return 0
    rows = step.sent.sum(0) - step.sent[rank]
    return sum(4 * share.table.dim * int(n) for share, n in zip(step.shares, rows, strict=True))


def squared_norm(collection: "DynamicEmbeddingCollection", reduced: Sequence[RowGradients]) -> float:
    """Return the sum of the squares of the gradients of this rank, in float64.

    Those of shared rows, which all ranks have, count on rank 0.
    """
    total: float | Tensor = 0.0
    for table, rows in zip(collection.physical, reduced, strict=True):
        total = total + table.backend.squared_norm(rows.grads.contiguous())
        if rows.shared is not None and collection.exchange.rank == 0:
            functions = functions_at(rows.shared.grads.device, table.backend)
            total = total + functions.squared_norm(rows.shared.grads.contiguous())
    return float(total)
