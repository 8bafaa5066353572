"""What policies add to the files of tables: the clock, and tables "<table>/candidates", "/evicted" and "/pinned"."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .table import SIDE_TABLES, PhysicalTable
from .use import USE_SLOTS

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection

SIDE_COLUMNS = {slot.name: (torch.int32, 0) for slot in USE_SLOTS}
NO_POLICIES: dict[str, Any] = {"clock": 0, "side_rows": {}, "dropped": {}}  # of files that do not say


def side_name(table: str, side: str) -> str:
    """Return the name of a side table in files; no table has it, because names have no slash."""
    return f"{table}/{side}"


def filled_sides(collection: "DynamicEmbeddingCollection") -> list[tuple[str, str]]:
    """Return (table, side table) where some rank has entries. Collective."""
    pairs = [(name, side) for name in collection.table_names for side in SIDE_TABLES]
    counts = []
    for name, side in pairs:
        position, logical = collection.places[name]
        table = collection.physical[position].side.get(side)
        counts.append(0 if table is None else table.num_rows(logical))
    totals = _sum(collection, counts)
    return [pair for pair, total in zip(pairs, totals, strict=True) if total]


def policy_state(collection: "DynamicEmbeddingCollection", side_rows: Mapping[str, int]) -> dict[str, Any]:
    """Return the clock, the entries of side tables and how many the logs have lost, as JSON values. Collective."""
    dropped = []
    for position, logical in collection.places.values():
        log = collection.physical[position].side.get("evicted")
        dropped.append(0 if log is None else log.dropped[logical])
    lost = dict(zip(collection.places, _sum(collection, dropped), strict=True))
    return {"clock": collection.clock, "side_rows": dict(side_rows), "dropped": {t: n for t, n in lost.items() if n}}


def _sum(collection: "DynamicEmbeddingCollection", numbers: Sequence[int]) -> list[int]:
    return [sum(column) for column in zip(*collection.exchange.gather_ints(numbers), strict=True)]


def wanted_sides(
    collection: "DynamicEmbeddingCollection", fresh: Sequence[PhysicalTable], state: Mapping[str, Any]
) -> dict[str, tuple[PhysicalTable, int]]:
    """Return the side tables that a `policy_state` has and the collection uses: name -> empty table, position in it.

    Counters of ids that wait are of no use to a table without admission.
    """
    found = {}
    for name, config in collection.tables.items():
        position, logical = collection.places[name]
        for side in SIDE_TABLES:
            wanted = side != "candidates" or config.min_count > 1
            if wanted and side_name(name, side) in state["side_rows"]:
                found[side_name(name, side)] = fresh[position].side_table(side), logical
    return found


def restore_policy_state(
    collection: "DynamicEmbeddingCollection", fresh: Sequence[PhysicalTable], state: Mapping[str, Any]
) -> None:
    """Set the clock, and what the logs have lost, on the first rank."""
    collection.clock = int(state["clock"])
    for name, lost in state["dropped"].items() if collection.exchange.rank == 0 else ():
        position, logical = collection.places[name]
        fresh[position].side_table("evicted").dropped[logical] = int(lost)
