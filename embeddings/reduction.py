"""Gradients of pending steps -> one summed gradient per owned row, the same on any number of ranks up to rounding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .step import Step, TableShare

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection


@dataclass
class RowGradients:
    """Gradients of the touched rows of one physical table on their owner."""

    tables: Tensor  # int32 [n]: logical table inside the physical one
    handles: Tensor  # int64 [n], distinct
    grads: Tensor  # float32 [n, dim]


def agree_on_touched(collection: "DynamicEmbeddingCollection", steps: Sequence[Step]) -> dict[int, set[str]]:
    """Return, for the serial of each step that a backward pass reached on some rank, the tables it reached. Collective.

    Raises RuntimeError, on every rank, when a rank no longer holds a step that has gradients elsewhere.
    """
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

    One all-to-all for all tables of all steps. Order of summation: each rank has summed over its own occurrences (in
    the leaf), the owner adds ranks in rank order, then steps in the order of their preparation.
    """
    exchange = collection.exchange
    active = [step for step in steps if step.serial in touched]
    if not active:
        return []
    parts = [_leaf_gradient(share) for step in active for share in step.shares]
    sent = torch.cat([step.sent for step in active], dim=1)
    received = torch.cat([step.received for step in active], dim=1)
    incoming = iter(exchange.swap(parts, sent, received))
    summed: list[list[RowGradients]] = [[] for _ in collection.physical]
    for step in active:
        for p, share in enumerate(step.shares):
            reached = [config.name in touched[step.serial] for config in share.table.configs]
            summed[p].append(_sum_over_ranks(share, next(incoming), torch.tensor(reached)))
        step.statistics["bytes_sent"] += _bytes_sent(step, exchange.rank)
    return [_sum_over_steps(share, s, scale) for share, s in zip(active[0].shares, summed, strict=True)]


def _leaf_gradient(share: TableShare) -> Tensor:
    assert share.leaf is not None
    if share.leaf.grad is None:
        return torch.zeros(share.requested, share.table.dim, dtype=torch.float32, device="cpu")
    return share.leaf.grad.cpu()


def _sum_over_ranks(share: TableShare, grads: Tensor, reached: Tensor) -> RowGradients:
    """Sum what arrived, float32 [R, dim], by owned pair; drop ids without a row and tables without a gradient."""
    if share.inverse is not None:
        grads = share.table.backend.segment_sum(grads, share.inverse, len(share.handles))
    keep = (share.handles >= 0) & reached[share.tables.long()]
    if keep.all():
        return RowGradients(share.tables, share.handles, grads)
    return RowGradients(share.tables[keep], share.handles[keep], grads[keep])


def _sum_over_steps(share: TableShare, steps: list[RowGradients], scale: float) -> RowGradients:
    if len(steps) == 1:
        grads = steps[0].grads if scale == 1.0 else steps[0].grads * scale
        return RowGradients(steps[0].tables, steps[0].handles, grads)
    handles = torch.cat([step.handles for step in steps])
    unique = share.table.backend.unique(handles)
    tables = torch.empty(len(unique.ids), dtype=torch.int32, device="cpu")
    tables[unique.inverse] = torch.cat([step.tables for step in steps])
    values = torch.cat([step.grads for step in steps])
    grads = share.table.backend.segment_sum(values, unique.inverse, len(unique.ids))
    return RowGradients(tables, unique.ids, grads * scale)


def _bytes_sent(step: Step, rank: int) -> int:
    rows = step.sent.sum(0) - step.sent[rank]
    return sum(4 * share.table.dim * int(n) for share, n in zip(step.shares, rows, strict=True))


def squared_norm(reduced: Sequence[RowGradients]) -> float:
    """Return the sum of the squares of the gradients on this rank: norms of rows in float32, their sum in float64."""
    return sum(torch.linalg.vector_norm(r.grads, dim=1).double().square().sum().item() for r in reduced)
