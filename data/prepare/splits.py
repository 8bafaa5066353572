"""Train, validation and test rows: prefixes of the users' histories, with the index from which events are targets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from grzoo.data.jagged import Int64, cut_rows
from numpy.typing import NDArray

from .config import PrepareConfig
from .log import GroupedLog

_CHUNK = 1 << 22  # events that are looked at together: the columns may be larger than memory
_BINS = 1 << 16


@dataclass(frozen=True)
class SplitRows:
    """Rows of a split: the first `length` events of `user`; those from `target_from` on are targets. int64 [rows]."""

    user: Int64
    length: Int64
    target_from: Int64


@dataclass(frozen=True)
class Split:
    """The splits by name, the arguments that define them (for schema.json) and remarks for the report."""

    rows: Mapping[str, SplitRows]
    arguments: Mapping[str, Any]
    remarks: tuple[str, ...]


def split_log(grouped: GroupedLog, config: PrepareConfig) -> Split:
    """Split a grouped log as `config` says."""
    if config.split == "none":
        return Split({"train": _train(grouped.lengths)}, {"kind": "none"}, ())
    return leave_one_out(grouped, config.validation) if config.split == "leave_one_out" else temporal(grouped, config)


def check_split(config: PrepareConfig, has_timestamps: bool) -> None:
    """ValueError where the split needs times and the log has none."""
    if config.split == "temporal" and not has_timestamps:
        raise ValueError("a temporal split needs timestamps, and this log has none: use split leave_one_out")


def leave_one_out(grouped: GroupedLog, validation: str) -> Split:
    """The last event of each user is the test target, with validation "last" the one before it the validation target.

    Users with fewer than two (three) events are in train only.
    """
    lengths = grouped.lengths
    held_out = 1 if validation == "none" else 2
    tested = lengths > held_out
    users = np.flatnonzero(tested)
    rows = {"train": _train(np.where(tested, lengths - held_out, lengths))}
    if validation == "last":
        rows["validation"] = SplitRows(users, lengths[users] - 1, lengths[users] - 2)
    rows["test"] = SplitRows(users, lengths[users], lengths[users] - 1)
    few = int((~tested).sum())
    remarks = (f"{few} users with fewer than {held_out + 1} events are in train only",) if few else ()
    reason = f"no user has the {held_out + 1} events that holding out the last {held_out} takes"
    _require(rows, reason + ("; use validation none" if held_out > 1 else ": the log has one event per user"))
    return Split(rows, {"kind": "leave_one_out", "validation": validation}, remarks)


def temporal(grouped: GroupedLog, config: PrepareConfig) -> Split:
    """Events before the cutoff are train events, those from it on are test targets of users with earlier ones.

    Without a cutoff it is the time before which all but `test_fraction` of the events lie. With validation "last", as
    many events as the test has, directly before the cutoff, are validation targets instead of train events.
    """
    check_split(config, "timestamp" in grouped.columns)
    times = grouped.columns["timestamp"]
    events = len(times)
    cutoff = config.cutoff
    if cutoff is None:
        cutoff = kth_smallest(times, min(round(events * (1 - config.test_fraction)), events - 1))
    before = _events_before(grouped, times, cutoff)
    after = events - int(before.sum())
    if not 0 < after < events:
        raise ValueError(
            f"cutoff {cutoff} leaves {events - after} train and {after} test events; "
            f"the log spans {times.min()} to {times.max()}"
        )
    arguments: dict[str, Any] = {"kind": "temporal", "cutoff": cutoff, "validation": config.validation}
    rows: dict[str, SplitRows] = {}
    first = before
    if config.validation == "last":
        if 2 * after >= events:
            raise ValueError(f"cutoff {cutoff} leaves too few events before it for a validation part of {after} events")
        arguments["validation_cutoff"] = kth_smallest(times, events - 2 * after)
        first = _events_before(grouped, times, arguments["validation_cutoff"])
        rows["validation"] = _targets(first, before)
    rows = {"train": _train(first), **rows, "test": _targets(before, grouped.lengths)}
    _require(rows, f"no event from cutoff {cutoff} on has an earlier event of its user")
    new = int(((before == 0) & (grouped.lengths > 0)).sum())
    remarks = (f"{new} users have no event before the cutoff: their first event is context only",) if new else ()
    return Split(rows, arguments, remarks)


def _events_before(grouped: GroupedLog, times: NDArray[Any], cutoff: int) -> Int64:
    """Events of each user before `cutoff`, int64 [users]."""
    counts = np.zeros(len(grouped.lengths), dtype=np.int64)
    for first, last in cut_rows(grouped.lengths, _CHUNK):
        offsets = grouped.offsets[first : last + 1]
        running = np.concatenate([[0], np.cumsum(times[offsets[0] : offsets[-1]] < cutoff)])
        counts[first:last] = np.diff(running[offsets - offsets[0]])
    return counts


def kth_smallest(values: Int64, k: int) -> int:
    """`np.sort(values)[k]` by counting, without a copy of `values` (int [n], mapped ones included)."""
    low, high = int(values.min()), int(values.max())
    while low < high:
        width = -(-(high - low + 1) // _BINS)
        counts = np.zeros(_BINS, dtype=np.int64)
        for first in range(0, len(values), _CHUNK):
            chunk = values[first : first + _CHUNK]
            inside = chunk[(chunk >= low) & (chunk <= high)]
            counts += np.bincount((inside - low) // width, minlength=_BINS)
        below = np.cumsum(counts)
        place = int(np.searchsorted(below, k, side="right"))
        k -= int(below[place - 1]) if place else 0
        low, high = low + place * width, min(high, low + (place + 1) * width - 1)
    return low


def _train(lengths: Int64) -> SplitRows:
    users = np.flatnonzero(lengths > 0)
    return SplitRows(users, lengths[users], np.ones(len(users), dtype=np.int64))


def _targets(context: Int64, lengths: Int64) -> SplitRows:
    # The first event of a user has nothing before it and cannot be a target.
    target_from = np.maximum(context, 1)
    users = np.flatnonzero(lengths > target_from)
    return SplitRows(users, lengths[users], target_from[users])


def _require(rows: Mapping[str, SplitRows], reason: str) -> None:
    for name, part in rows.items():
        if not len(part.user):
            raise ValueError(f"the split {name!r} is empty: {reason}")
