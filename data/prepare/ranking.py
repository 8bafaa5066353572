"""What ranking models read of a log with ratings: labels, actions, genres, profiles and cross features of the past.

Every value of an event is made from events with a strictly earlier time, of all users; events of the same second do not
see each other.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from grzoo.data.jagged import Int64
from numpy.typing import NDArray

from .log import EventLog, codes_of

Float64 = NDArray[np.float64]

LABELS = {"like": 4.0, "love": 5.0}  # task -> least rating; unknown ratings have label -1
CROSS_FEATURES = (
    "user_events",
    "user_mean",
    "item_events",
    "item_mean",
    "user_genre_events",
    "user_genre_mean",
)
_PRIOR_MEAN, _PRIOR_EVENTS = 3.5, 5.0
_MAX_GENRES = 63


def add_ranking_columns(log: EventLog) -> EventLog:
    """The log with event features `action`, `genres`, `like`, `love`, `CROSS_FEATURES` and the profile of the user.

    action: 1 + twice the rating, 1 where it is unknown.  genres: one bit per genre.  `*_events` are log(1 + count),
    `*_mean` are mean ratings less 3.5, drawn to 0 as by five ratings of 3.5; `user_genre_*` are over the genres of the
    item. Raises ValueError for a log without ratings or times.
    """
    if log.timestamps is None or "rating" not in log.features:
        raise ValueError(
            "ranking needs a log with timestamps and ratings: of a log of your own name the column, --feature_columns "
            "rating; else leave --ranking away, or choose another log"
        )
    rating = np.asarray(log.features["rating"], dtype=np.float64)
    known = np.isfinite(rating)
    names, bits = _genre_bits(log)
    columns: dict[str, NDArray[Any]] = {
        "action": np.where(known, 1 + np.rint(2 * np.nan_to_num(rating)), 1).astype(np.int64),
        "genres": bits,
    }
    for task, least in LABELS.items():
        columns[task] = np.where(known, rating >= least, -1).astype(np.int8)
    columns |= cross_features(log, bits, len(names))
    profiles, values = _profiles(log)
    columns |= profiles
    about = {
        "user_features": values,
        "tasks": {task: f"rating >= {least:g}" for task, least in LABELS.items()},
        "event_features": ["action"],
        "item_features": {"genres": names} if names else {},
        "cross_features": list(CROSS_FEATURES),
    }
    return replace(log, features={**log.features, **columns}, ranking=about)


def cross_features(log: EventLog, genre_bits: Int64, num_genres: int) -> dict[str, NDArray[np.float32]]:
    """float32 [events] by name, see `add_ranking_columns`."""
    assert log.timestamps is not None
    rating = np.asarray(log.features["rating"], dtype=np.float64)
    users, items = codes_of(log.users)[0], codes_of(log.items)[0]
    event, genre = np.nonzero((genre_bits[:, None] >> np.arange(num_genres)) & 1)
    groups = {
        "user": _Group(users, np.arange(len(users))),
        "item": _Group(items, np.arange(len(items))),
        "user_genre": _Group(users[event] * max(1, num_genres) + genre, event),
    }
    features: dict[str, NDArray[np.float32]] = {}
    for name, group in groups.items():
        past = past_sums(group.keys, log.timestamps[group.events], _values(rating)[group.events])
        total = np.stack([np.bincount(group.events, column, len(rating)) for column in past.T], axis=1)
        features[f"{name}_events"] = np.log1p(total[:, 0]).astype(np.float32)
        features[f"{name}_mean"] = ((total[:, 2] - _PRIOR_MEAN * total[:, 1]) / (total[:, 1] + _PRIOR_EVENTS)).astype(
            np.float32
        )
    return {name: features[name] for name in CROSS_FEATURES}


@dataclass(frozen=True)
class _Group:
    """Entries of a statistic: the group of each, and the event that it belongs to. int64 [entries]."""

    keys: Int64
    events: Int64


def _values(rating: Float64) -> Float64:
    """[events, 3]: one, is rated, rating (0 where unknown)."""
    known = np.isfinite(rating)
    return np.stack([np.ones_like(rating), known.astype(np.float64), np.where(known, rating, 0.0)], axis=1)


def past_sums(groups: Int64, times: Int64, values: Float64) -> Float64:
    """For each entry the sum of `values` [n, k] over the entries of its group with a strictly earlier time, [n, k]."""
    if not len(groups):
        return np.zeros_like(values)
    order = np.lexsort((times, groups))
    g, t = groups[order], times[order]
    before = np.zeros((len(order) + 1, values.shape[1]))
    np.cumsum(values[order], axis=0, out=before[1:])
    new_group = np.concatenate([[True], g[1:] != g[:-1]])
    new_time = new_group | np.concatenate([[True], t[1:] != t[:-1]])
    index = np.arange(len(order))
    group_start = np.maximum.accumulate(np.where(new_group, index, 0))
    time_start = np.maximum.accumulate(np.where(new_time, index, 0))
    past = np.empty_like(values)
    past[order] = before[time_start] - before[group_start]
    return past


def _genre_bits(log: EventLog) -> tuple[list[str], Int64]:
    """Names of the genres, and for every event the bits of its item's."""
    metadata = log.item_metadata
    if metadata is None or "genres" not in metadata.column_names:
        return [], np.zeros(len(log), dtype=np.int64)
    lists = metadata["genres"].combine_chunks()
    names = sorted(name for name in pc.unique(pc.list_flatten(lists)).to_pylist() if name)
    if len(names) > _MAX_GENRES:
        raise ValueError(f"items have {len(names)} genres, and {_MAX_GENRES} fit in one feature: keep fewer")
    place = {name: at for at, name in enumerate(names)}
    bits = np.array([sum(1 << place[n] for n in set(row or []) if n) for row in lists.to_pylist()], dtype=np.int64)
    rows = pc.index_in(log.items, value_set=metadata["item_id"].combine_chunks().cast(log.items.type))
    at = rows.fill_null(-1).to_numpy(zero_copy_only=False)
    return names, np.where(at >= 0, bits[at], 0)


def _profiles(log: EventLog) -> tuple[dict[str, NDArray[Any]], dict[str, list[Any]]]:
    """Profile features of each event's user as numbers from 1 (0: unknown), and the values that they number."""
    columns: dict[str, NDArray[Any]] = {}
    values: dict[str, list[Any]] = {}
    if log.user_metadata is None:
        return columns, values
    table = log.user_metadata
    rows = pc.index_in(log.users, value_set=table["user_id"].combine_chunks().cast(log.users.type))
    for name in table.column_names:
        if name == "user_id":
            continue
        column = table[name].combine_chunks()
        values[name] = sorted(value for value in pc.unique(column).to_pylist() if value is not None)
        codes = pc.index_in(column.take(rows), value_set=pa.array(values[name], column.type))
        columns[name] = pc.add(codes.cast(pa.int64()).fill_null(-1), 1).to_numpy(zero_copy_only=False)
    return columns, values


def age_group(ages: NDArray[Any]) -> Int64:
    """The age groups of MovieLens-1M: 1, 18, 25, 35, 45, 50, 56 (the least age of each)."""
    least = np.array([1, 18, 25, 35, 45, 50, 56])
    return least[np.searchsorted(least, np.maximum(ages, 1), side="right") - 1]


__all__ = ["CROSS_FEATURES", "LABELS", "add_ranking_columns", "age_group", "cross_features", "past_sums"]
