"""What a step does on the owner of its ids in tables with policies: admit, insert, count. See README.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .use import COUNT, LAST_USE, read_slot, record_use

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection
    from .table import PhysicalTable


@dataclass
class Visit:
    """The distinct pairs of a step on their owner, and what becomes of those without a row. Nothing is changed yet."""

    table: "PhysicalTable"
    tables: Tensor  # int32 [O]
    ids: Tensor  # int64 [O]
    occurrences: Tensor | None  # int64 [O], of all ranks; None: this lookup does not count
    handles: Tensor  # int64 [O]; -1: no row yet
    new: Tensor | None  # int64: positions that get a row; None: all without one (they were not looked for yet)
    waiting: Tensor  # int64: positions that stay unknown, and are counted if this lookup counts

    def commit(self, now: int) -> int:
        """Insert, count and note the use as of step `now`; fill in handles and return how many rows were inserted."""
        table, new = self.table, self.new
        if new is None:
            assert self.occurrences is not None
            self.handles, inserted = table.lookup(self.tables, self.ids, insert=True)
            self._record(self.occurrences, now)
            return inserted
        if len(new):
            self.handles[new] = table.insert_new(self.tables[new], self.ids[new])
            if "candidates" in table.side:
                table.side["candidates"].erase(self.tables[new], self.ids[new])
        if self.occurrences is not None:
            self._record(self.occurrences, now)
        elif len(new) and table.use_slots:  # a row is born used
            record_use(table.storage, self.handles[new], torch.zeros_like(new), now, None)
        return len(new)

    def _record(self, occurrences: Tensor, now: int) -> None:
        table = self.table
        if table.use_slots:
            known = slice(None) if len(self.waiting) == 0 else (self.handles >= 0).nonzero().flatten()
            half_lives = None if table.half_lives is None else table.half_lives[self.tables[known].long()]
            record_use(table.storage, self.handles[known], occurrences[known], now, half_lives)
        counted = self.waiting[table.min_counts[self.tables[self.waiting].long()] > 1]
        if len(counted):
            candidates = table.side_table("candidates")
            handles, _ = candidates.lookup(self.tables[counted], self.ids[counted], insert=True)
            record_use(candidates.storage, handles, occurrences[counted], now, None)


def visit(table: "PhysicalTable", tables: Tensor, ids: Tensor, occurrences: Tensor | None, *, insert: bool) -> Visit:
    """Find distinct pairs and decide who is admitted; only reads. See `Visit` for the tensors."""
    if insert and occurrences is not None and not table.is_selective:
        return Visit(table, tables, ids, occurrences, ids, None, ids[:0])
    handles = table.storage.find(tables, ids)
    missing = (handles < 0).nonzero().flatten()
    if not insert:
        return Visit(table, tables, ids, occurrences, handles, missing[:0], missing)
    needed = table.min_counts[tables[missing].long()]
    if len(missing) == 0 or not table.has_admission:
        return Visit(table, tables, ids, occurrences, handles, missing, missing[:0])
    met = torch.zeros_like(missing) if occurrences is None else occurrences[missing].clone()
    if "candidates" in table.side:
        storage = table.side["candidates"].storage
        found = storage.find(tables[missing], ids[missing])
        before = (found >= 0).nonzero().flatten()
        met[before] += read_slot(storage, COUNT, found[before])
    admitted = (needed == 1) | (met >= needed)
    return Visit(table, tables, ids, occurrences, handles, missing[admitted], missing[~admitted])


def check_ceilings(collection: "DynamicEmbeddingCollection", visits: Sequence[Visit | None]) -> None:
    """Raise ValueError, on every rank, when tables that do not evict would grow beyond max_rows. Collective."""
    limited = [config for config in collection.tables.values() if config.has_hard_ceiling]
    numbers: list[int] = []  # of each limited table: rows, new rows
    for config in limited:
        position, logical = collection.places[config.name]
        found = visits[position]
        assert found is not None and found.new is not None
        numbers += [found.table.num_rows(logical), int((found.tables[found.new] == logical).sum())]
    totals = [sum(column) for column in zip(*collection.exchange.gather_ints(numbers), strict=True)]
    for config, rows, new in zip(limited, totals[::2], totals[1::2], strict=True):
        assert config.max_rows is not None
        if new and rows + new > config.max_rows:
            raise ValueError(
                f"table {config.name!r} has {rows} rows and needs {new} more, max_rows is {config.max_rows} and it has "
                "no eviction: raise max_rows, give it an eviction policy or an admission threshold, or erase ids"
            )


def forget_candidates(table: "PhysicalTable", clock: int) -> None:
    """Drop counters of ids that were not met for forget_after steps; for each logical table at multiples of that."""
    due = {
        logical: config.admission["forget_after"]
        for logical, config in enumerate(table.configs)
        if config.admission is not None and clock % config.admission["forget_after"] == 0
    }
    if not due or "candidates" not in table.side:
        return
    candidates = table.side["candidates"]
    tables, ids, handles = candidates.storage.keys()
    last_use = read_slot(candidates.storage, LAST_USE, handles)
    for logical, forget_after in due.items():
        old = (tables == logical) & (last_use <= clock - forget_after)
        candidates.erase(tables[old], ids[old])
