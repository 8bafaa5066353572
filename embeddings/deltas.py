"""What changed in tables since a step, for copies that follow them: rows to write, ids to delete."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .use import LAST_USE

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection


@dataclass(frozen=True)
class Delta:
    """The changes of one rank's tables between two values of `collection.clock`; plain tensors, to be sent or saved."""

    base: int  # the copy that it is applied to is of this step
    clock: int  # and of this one afterwards
    rows: dict[str, dict[str, Tensor]]  # table -> what `export_rows` gives, of rows that may have changed
    deleted: dict[str, Tensor]  # table -> int64 [n], ids that lost their row and have none now


def take_delta(collection: "DynamicEmbeddingCollection", base: int) -> Delta:
    """Return what changed on this rank since the clock was `base`, and take the deleted ids from the log.

    Rows that were used since, or imported (without a `last_use` from before), with their state; a row that went and
    came back is there once, as it is now. Shared rows and ids that wait for admission are not part of it.

    Args:
        collection: tables that track their use (`TableConfig(track_use=True)` or an eviction policy).
        base: the clock when the last delta was taken, or when the full copy was saved.

    Raises:
        ValueError: a table does not track its use, `base` is in the future, or the log lost deletions since it was
            read last: then a full copy is needed.
    """
    if not 0 <= base <= collection.clock:
        raise ValueError(f"a delta since step {base} cannot be taken after step {collection.clock}")
    untracked = [name for name, config in collection.tables.items() if not config.tracks_use]
    if untracked:
        raise ValueError(f"tables {untracked} do not know which rows changed: give them TableConfig(track_use=True)")
    for name in collection.table_names:  # all of them before one of the logs is emptied
        position, logical = collection.places[name]
        log = collection.physical[position].side.get("evicted")
        if log is not None and log.dropped[logical]:
            raise ValueError(
                f"the log of table {name!r} lost {log.dropped[logical]} deletions: save all rows, drain_evicted() each "
                "table, and take deltas more often"
            )
    rows, deleted = {}, {}
    for name in collection.table_names:
        found = collection.export_rows(name)
        changed = found[LAST_USE] >= base  # those used in step `base` once more: an import after it looks the same
        rows[name] = {column: values[changed] for column, values in found.items()}
        gone = collection.drain_evicted(name).ids
        deleted[name] = gone[~torch.isin(gone, found["ids"])]
    return Delta(base, collection.clock, rows, deleted)


def apply_delta(collection: "DynamicEmbeddingCollection", parts: Sequence[Delta]) -> None:
    """Bring a copy from step `base` to step `clock` of a delta. Collective.

    Args:
        collection: tables of the same configs on any number of ranks, as they were at step `base`. State of optimizers
            that it does not have is left out.
        parts: the deltas of all ranks that trained, all of them on every rank.

    Raises ValueError, before anything is changed, when the parts are of different steps or do not follow the copy.
    """
    spans = sorted({(part.base, part.clock) for part in parts})
    if len(spans) != 1:
        raise ValueError(f"the parts of a delta must be of the same steps, these are of {spans}")
    ((base, clock),) = spans
    if base != collection.clock:
        raise ValueError(f"a delta from step {base} to {clock} does not follow a copy of step {collection.clock}")
    collection.clock = clock
    for name in collection.table_names:
        collection.erase(name, torch.cat([part.deleted[name] for part in parts]))
        physical = collection.physical[collection.places[name][0]]
        kept = {"ids", *physical.columns(state=True)}
        for part in parts:
            collection.import_rows(name, {c: values for c, values in part.rows[name].items() if c in kept})
        collection.drain_evicted(name)
