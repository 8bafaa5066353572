"""Eviction at the step boundary: the same rows go on any number of ranks, however tables are merged. See README.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .admission import forget_candidates
from .cutoff import select_smallest
from .deletion import delete_rows, in_flight
from .use import COUNT, LAST_USE, decayed, read_slot

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection
    from .config import TableConfig
    from .table import PhysicalTable


@dataclass
class _Candidates:
    """Rows of one logical table on this rank, as eviction after step `clock` sees them."""

    config: "TableConfig"
    table: "PhysicalTable"
    total: int  # rows
    tables: Tensor  # int32 [n] of those that may go
    ids: Tensor  # int64 [n]
    handles: Tensor  # int64 [n]
    scores: Tensor  # int64 [n]: the lowest goes first
    expired: int

    @property
    def policy(self) -> Mapping[str, Any]:
        assert self.config.eviction is not None
        return self.config.eviction


def evict_due(collection: "DynamicEmbeddingCollection") -> None:
    """Evict from the tables whose turn it is after step `collection.clock`, and drop old counters. Collective.

    Raises ValueError, on every rank, when a table stays above max_rows because all its rows are in use or pinned. A
    rank without memory for it tells the others, and all raise.
    """
    clock, exchange = collection.clock, collection.exchange
    for table in collection.physical:
        forget_candidates(table, clock)
    due = [c for c in collection.tables.values() if c.eviction is not None and clock % c.eviction["every"] == 0]
    if not due:
        return
    found: list[_Candidates] = []
    problem: Exception | None = None
    try:
        found = [candidates for table in collection.physical for candidates in _scan(collection, table, due)]
    except Exception as error:
        problem = error
    exchange.agree(problem)
    sizes = exchange.gather_ints([n for c in found for n in (c.total, len(c.ids), c.expired)])
    totals = [sum(column) for column in zip(*sizes, strict=True)]
    full: list[str] = []
    for c, total, evictable, expired in zip(found, totals[::3], totals[1::3], totals[2::3], strict=True):
        count = how_many(c.policy, c.config.max_rows, total, evictable, expired)
        score_bits = 64 if c.policy["kind"] == "lfu" else -(-clock.bit_length() // 16) * 16
        chosen = select_smallest(c.scores, c.ids, count, exchange, score_bits=score_bits)
        try:
            delete_rows(collection, c.table, c.tables[chosen], c.ids[chosen], c.handles[chosen])
            collection.tally(c.config.name).evicted += int(chosen.sum())
        except Exception as error:
            problem = error
        if c.config.max_rows is not None and total - count > c.config.max_rows and count == evictable:
            full.append(f"table {c.config.name!r} has {total - count} rows and max_rows is {c.config.max_rows}")
    exchange.agree(problem)
    if full:
        raise ValueError(
            f"{'; '.join(full)}, and none may be evicted after step {clock}: they were used in it, are pinned or wait "
            "for gradients. Raise max_rows, unpin ids, or use smaller batches"
        )


def how_many(policy: Mapping[str, Any], max_rows: int | None, total: int, evictable: int, expired: int) -> int:
    """Return how many rows go: those expired or above max_rows, within min_rows, max_evictions and what may go."""
    wanted = max(expired, 0 if max_rows is None else total - max_rows)
    allowed = min(evictable, total - policy.get("min_rows", 0))
    if policy["max_evictions"] is not None:
        allowed = min(allowed, policy["max_evictions"])
    return max(0, min(wanted, allowed))


def _scan(
    collection: "DynamicEmbeddingCollection", table: "PhysicalTable", due: list["TableConfig"]
) -> list[_Candidates]:
    positions = [(logical, config) for logical, config in enumerate(table.configs) if config in due]
    if not positions:
        return []
    clock, storage = collection.clock, table.storage
    tables, ids, handles = storage.keys()
    last_use = read_slot(storage, LAST_USE, handles).long()
    free = last_use < clock
    waiting = in_flight(collection.steps_in_flight(), table)
    if len(waiting):
        free &= ~torch.isin(handles, waiting)
    if "pinned" in table.side:
        free &= table.side["pinned"].storage.find(tables, ids) < 0
    found = []
    for logical, config in positions:
        mine = tables == logical
        total = int(mine.sum())
        chosen = (mine & free).nonzero().flatten()
        used = last_use[chosen]
        expired = _expired(config, used, clock)
        scores = _scores(table, config, handles[chosen], used, clock)
        rows = tables[chosen], ids[chosen], handles[chosen]
        found.append(_Candidates(config, table, total, *rows, scores, expired))
    return found


def _expired(config: "TableConfig", last_use: Tensor, clock: int) -> int:
    assert config.eviction is not None
    steps = config.eviction.get("steps")
    return 0 if steps is None else int((last_use <= clock - steps).sum())


def _scores(table: "PhysicalTable", config: "TableConfig", handles: Tensor, last_use: Tensor, clock: int) -> Tensor:
    """Least recently used first; with lfu the least frequent first, and of those the least recently used."""
    assert config.eviction is not None
    if config.eviction["kind"] != "lfu":
        return last_use
    counts = read_slot(table.storage, COUNT, handles).long()
    half_life = torch.tensor(config.eviction["half_life"], dtype=torch.int64, device=handles.device)
    return (decayed(counts, last_use, clock, half_life) << 32) | last_use
