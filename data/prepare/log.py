"""A log of events as every source gives it, and its grouped form: one run of events per user, oldest first."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from grzoo.data.catalogue import hash_ids
from grzoo.data.jagged import Int64, offsets_of
from numpy.typing import NDArray


@dataclass
class EventLog:
    """Events in the order of the source.

    users, items: int64 or string [events].  timestamps: int64 seconds [events] or None: then the order is the time.
    features: name -> numeric [events].  item_metadata: table with a column `item_id` of the type of `items`, unique.
    user_metadata: the same of the users, with a column `user_id`.  ranking: which features ranking models read, see
    `ranking.py`.  source: where the events come from, in words.  notes: what a user of the data must know.
    """

    users: pa.Array
    items: pa.Array
    timestamps: Int64 | None = None
    features: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    item_metadata: pa.Table | None = None
    user_metadata: pa.Table | None = None
    ranking: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.users, self.items = plain_ids(self.users, "user"), plain_ids(self.items, "item")
        if not len(self.users):
            raise ValueError(f"there are no events in {self.source or 'the log'}: the file is empty")
        if self.timestamps is not None:
            check_times(self.timestamps, self.source)

    def __len__(self) -> int:
        return len(self.users)

    def filter(self, mask: NDArray[np.bool_]) -> "EventLog":
        """The events where `mask` (bool [events]) is set."""
        keep = pa.array(mask)
        return EventLog(
            users=self.users.filter(keep),
            items=self.items.filter(keep),
            timestamps=None if self.timestamps is None else self.timestamps[mask],
            features={name: values[mask] for name, values in self.features.items()},
            item_metadata=self.item_metadata,
            user_metadata=self.user_metadata,
            ranking=self.ranking,
            source=self.source,
            notes=self.notes,
        )


def check_times(timestamps: Int64, source: str, first: int = 0) -> None:
    """ValueError where a time (int64 [n], of the events from number `first` on) is negative."""
    if (timestamps < 0).any():
        at = int(np.argmax(timestamps < 0))
        raise ValueError(
            f"event {first + at + 1} of {source} has timestamp {timestamps[at]}; timestamps are seconds "
            "since 1970, not negative: drop or repair such events"
        )


def plain_ids(values: pa.Array | pa.ChunkedArray, what: str, first: int = 0) -> pa.Array:
    """Ids as int64 or string in one chunk; ValueError where one is missing (event number `first` is the first)."""
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    if pa.types.is_dictionary(values.type):
        return plain_ids(values.cast(values.type.value_type), what, first)
    text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    missing = pc.equal(values, "").fill_null(True) if text else pc.is_null(values)
    if (row := pc.index(missing, True).as_py()) >= 0:
        raise ValueError(f"event {first + row + 1} has no {what} id: fill it or drop the event")
    if text:
        return values.cast(pa.string())
    if not pa.types.is_integer(values.type):
        raise ValueError(f"{what} ids are of type {values.type}; they must be integers or text: convert them to one")
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:  # unsigned ones beyond it
        return values.cast(pa.string())


def id_notes(user_ids: pa.Array, item_ids: pa.Array) -> tuple[str, ...]:
    """What to know of distinct ids that look like integers and are text."""
    notes = []
    for what, ids in (("user", user_ids), ("item", item_ids)):
        if not pa.types.is_string(ids.type) or not pc.all(pc.match_substring_regex(ids, r"^\s*-?[0-9]+\s*$")).as_py():
            continue
        other = pc.invert(pc.match_substring_regex(ids, "^(0|-?[1-9][0-9]{0,17}|-?[1-8][0-9]{18})$"))
        if (at := pc.index(other, True).as_py()) >= 0:
            notes.append(f"{what} ids are text, as integers would not keep {ids[at].as_py()!r} as it is written")
    return tuple(notes)


def codes_of(values: pa.Array) -> tuple[Int64, pa.Array]:
    """A number for each value, and the distinct values: ascending integers, or text in order of appearance."""
    if pa.types.is_integer(values.type):
        unique, inverse = np.unique(values.to_numpy(), return_inverse=True)
        return inverse.astype(np.int64), pa.array(unique)
    encoded = values.dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary


def k_core(log: EventLog, k: int) -> EventLog:
    """The log without users and items of fewer than `k` events, repeated until every one left has as many."""
    while True:
        users, items = codes_of(log.users)[0], codes_of(log.items)[0]
        keep = (np.bincount(users)[users] >= k) & (np.bincount(items)[items] >= k)
        if keep.all():
            return log
        if not keep.any():
            raise ValueError(f"k_core={k} leaves no event of {len(log)}; choose a smaller k")
        log = log.filter(keep)


@dataclass(frozen=True)
class GroupedLog:
    """Events sorted by user, then time (stable: ties keep the order of the source).

    user_ids: original ids [users].  offsets: int64 [users + 1].  item_codes: int64 [events], row of the item in
    `item_ids`. item_ids: original ids [items].  model_ids: int64 [items].  columns: name -> [events]: item_id (model
    ids), timestamp, features. item_metadata, ranking, source, notes: those of the log.
    """

    user_ids: pa.Array
    offsets: Int64
    item_codes: Int64
    item_ids: pa.Array
    model_ids: Int64
    id_mapping: str
    columns: Mapping[str, NDArray[Any]]
    item_metadata: pa.Table | None = None
    ranking: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def lengths(self) -> Int64:
        """Events of each user, int64 [users]."""
        return np.diff(self.offsets)


def group(log: EventLog, id_mapping: str | None = None) -> GroupedLog:
    """Group a log by user; `id_mapping` None takes identity for integers and hash for text."""
    user_codes, user_ids = codes_of(log.users)
    item_codes, item_ids = codes_of(log.items)
    mapping, model_ids = model_ids_of(item_ids, id_mapping)
    order = _order(user_codes, log.timestamps)
    item_codes = item_codes[order]
    columns: dict[str, NDArray[Any]] = {"item_id": model_ids[item_codes]}
    if log.timestamps is not None:
        columns["timestamp"] = log.timestamps[order]
    columns |= {name: values[order] for name, values in log.features.items()}
    offsets = offsets_of(np.bincount(user_codes, minlength=len(user_ids)))
    about = {name: getattr(log, name) for name in ("item_metadata", "ranking", "source")}
    about["notes"] = (*log.notes, *id_notes(user_ids, item_ids))
    return GroupedLog(user_ids, offsets, item_codes, item_ids, model_ids, mapping, columns, **about)


def _order(user_codes: Int64, timestamps: Int64 | None) -> Int64:
    if timestamps is None:
        return np.argsort(user_codes, kind="stable")
    first = int(timestamps.min())
    span = int(timestamps.max()) - first + 1
    if (int(user_codes.max()) + 1) * span < 1 << 62:
        # One stable sort of a combined key is several times faster than lexsort.
        return np.argsort(user_codes * span + (timestamps - first), kind="stable")
    return np.lexsort((timestamps, user_codes))


def model_ids_of(item_ids: pa.Array, id_mapping: str | None) -> tuple[str, Int64]:
    """The mapping that is used for distinct original ids, and their model ids, int64 [items]."""
    integers = pa.types.is_integer(item_ids.type)
    mapping = id_mapping or ("identity" if integers else "hash")
    if mapping == "vocabulary":
        return mapping, np.arange(1, len(item_ids) + 1, dtype=np.int64)
    if mapping == "identity" and integers:
        return mapping, item_ids.to_numpy().astype(np.int64)
    if mapping == "hash" and not integers:
        return mapping, _unique_hashes(item_ids)
    kind = "integers" if integers else "text"
    allowed = "identity or vocabulary" if integers else "hash or vocabulary"
    raise ValueError(f"id_mapping is {mapping!r}, but the item ids are {kind}: choose {allowed}")


def _unique_hashes(item_ids: pa.Array) -> Int64:
    hashes = hash_ids(item_ids)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    if len(same):
        pair = [item_ids[int(order[same[0] + i])].as_py() for i in (0, 1)]
        raise ValueError(f"item ids {pair[0]!r} and {pair[1]!r} have the same hash: use id_mapping vocabulary")
    return hashes
