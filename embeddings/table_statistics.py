"""Statistics of each table since they were asked for last."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection
    from .step import TableShare


@dataclass
class Tally:
    """What happened to one logical table on this rank since the last report."""

    rows_before: int = 0
    ids: int = 0  # looked up, with repetitions
    requested: int = 0  # distinct ids of a step on this rank
    received: int = 0  # distinct ids of a step that ranks asked of this one
    owned: int = 0  # distinct ids of a step on their owner
    unknown: int = 0  # of those, without a row
    evicted: int = 0
    erased: int = 0


def note_lookup(
    collection: "DynamicEmbeddingCollection",
    shares: Sequence["TableShare"],
    sent: Sequence[Tensor],
    received: Sequence[Tensor],
    *,
    insert: bool,
) -> None:
    """Add a step to the tallies; sent and received are the ids of each physical table, int64 [world, logical]."""
    for share, asked, arrived in zip(shares, sent, received, strict=True):
        names = [config.name for config in share.table.configs]
        requested = asked.sum(0).tolist()
        owned, unknown = requested, [0] * len(names)
        if share.inverse is not None:
            owned = _count(collection, share, "owned", None)
        if not insert or share.table.is_selective:
            unknown = _count(collection, share, "unknown", share.handles < 0)
        numbers = zip(names, requested, arrived.sum(0).tolist(), owned, unknown, strict=True)
        for name, of_rank, of_ranks, on_owner, without_row in numbers:
            tally = collection.tally(name)
            tally.requested += of_rank
            tally.received += of_ranks
            tally.owned += on_owner
            tally.unknown += without_row
        for (_, feature), index in share.index.items():
            collection.tally(collection.features[feature].table).ids += index.numel()


def _count(
    collection: "DynamicEmbeddingCollection", share: "TableShare", field: str, chosen: Tensor | None
) -> list[int]:
    """Return how many pairs (those `chosen`, bool [O]; None: all) are of each logical table.

    On a device they are counted there, for `settle` to fetch when somebody asks, and zeros are returned.
    """
    num_tables, tables = len(share.table.configs), share.tables
    if share.table.device.type == "cpu":
        tables = tables if chosen is None else tables[chosen]
        return [len(tables)] if num_tables == 1 else torch.bincount(tables, minlength=num_tables).tolist()
    if num_tables == 1:
        counts = torch.ones_like(tables).sum()[None] if chosen is None else chosen.sum()[None]
    else:
        logical = torch.arange(num_tables, dtype=torch.int32, device=tables.device)[:, None]
        hits = tables == logical
        counts = (hits if chosen is None else hits & chosen).sum(1)
    for position, table in enumerate(collection.physical):
        if table is share.table:
            before = collection.unsettled.get((position, field))
            collection.unsettled[position, field] = counts if before is None else before + counts
    return [0] * num_tables


def settle(collection: "DynamicEmbeddingCollection") -> None:
    """Add to the tallies what was counted on devices."""
    for (position, field), counts in collection.unsettled.items():
        for config, count in zip(collection.physical[position].configs, counts.tolist(), strict=True):
            tally = collection.tally(config.name)
            setattr(tally, field, getattr(tally, field) + count)
    collection.unsettled.clear()


def statistics(collection: "DynamicEmbeddingCollection") -> dict[str, dict[str, Any]]:
    """See `DynamicEmbeddingCollection.statistics`."""
    settle(collection)
    exchange = collection.exchange
    fields = ("rows_before", "ids", "requested", "received", "owned", "unknown", "evicted", "erased")
    numbers: list[int] = []
    for name in collection.table_names:
        tally = collection.tally(name)
        numbers += [collection.num_rows(name), *(getattr(tally, field) for field in fields)]
    everyone = torch.tensor(exchange.gather_ints(numbers)).view(exchange.world_size, len(collection.tables), -1)
    collection.start_tallies()
    return {name: _report(everyone[:, t].tolist()) for t, name in enumerate(collection.table_names)}


def _report(by_rank: list[list[int]]) -> dict[str, Any]:
    rows_by_rank = [numbers[0] for numbers in by_rank]
    rows, before, ids, requested, received, owned, unknown, evicted, erased = map(sum, zip(*by_rank, strict=True))
    growth = rows - before
    new_rows = growth + evicted + erased
    return {
        "rows": rows,
        "growth": growth,
        "new_rows": new_rows,
        "new_row_rate": _ratio(new_rows, owned),
        "unknown_rate": _ratio(unknown, owned),
        "evicted": evicted,
        "erased": erased,
        "dedup_ratio": _ratio(ids, requested),
        "owner_dedup_ratio": _ratio(received, owned),
        "rows_by_rank": rows_by_rank,
        "load_imbalance": _ratio(max(rows_by_rank) * len(rows_by_rank), rows),
    }


def _ratio(a: int, b: int) -> float:
    return a / b if b else 0.0
