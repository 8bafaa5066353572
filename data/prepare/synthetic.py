"""A synthetic log with what real ones have: Zipf items, long-tailed lengths, sessions, new items, structure to learn.

Each item belongs to a genre and has a few successors; each user prefers a few genres. An event follows the last one
(a successor of it), or the user's taste (an item of a preferred genre), or the crowd (popular or new items), never an
item that is not yet released. Everything is keyed by (seed, user, position): the log of a user does not depend on how
many others there are.
"""

import numpy as np
import pyarrow as pa
from grzoo.data.jagged import Int64, ranges
from grzoo.data.keyed import UInt64, below, fold, keyed, string_key, uniform
from numpy.typing import NDArray

from .config import PrepareConfig
from .log import EventLog

OPTIONS = frozenset({"seed", "num_users", "num_items", "mean_length"})

GENRES = (
    "drama", "comedy", "thriller", "romance", "mystery", "science fiction", "fantasy", "horror", "western",
    "documentary", "animation", "musical", "crime", "adventure", "family", "history", "war", "sport", "travel",
    "biography",
)  # fmt: skip
FIRST_TIME = 1_577_836_800  # 2020-01-01
SPAN = 2 * 365 * 86_400
NEW_WINDOW = 30 * 86_400
SUCCESSORS = 4
INTERESTS = 3
MIN_LENGTH = 8
MAX_LENGTH_FACTOR = 25
SIGMA = 0.9
ZIPF_EXPONENT = 0.8
USERS_PER_BLOCK = 1 << 16
P_SUCCESSOR, P_TASTE, P_POPULAR = 0.6, 0.25, 0.1  # the rest: new items

Float64 = NDArray[np.float64]


def read(config: PrepareConfig) -> EventLog:
    """The synthetic log of the config's seed and size."""
    world = _World(config.seed, config.num_items)
    blocks = [
        _block(world, config.seed, first, min(first + USERS_PER_BLOCK, config.num_users), config.mean_length)
        for first in range(0, config.num_users, USERS_PER_BLOCK)
    ]
    users, items, times = (np.concatenate([block[i] for block in blocks]) for i in range(3))
    return EventLog(
        users=pa.array(users),
        items=pa.array(items + 1),
        timestamps=times,
        item_metadata=world.metadata(),
        source=f"the synthetic generator, seed {config.seed}",
    )


class _World:
    """Items: genre, release time, popularity, successors. Arrays are indexed by item, from 0."""

    def __init__(self, seed: int, num_items: int) -> None:
        self.num_items = num_items
        key = keyed(seed, string_key("synthetic/items"))
        item = np.arange(num_items)
        self.genre = below(fold(fold(key, 1), item), len(GENRES))
        rank = np.argsort(np.argsort(uniform(fold(fold(key, 2), item)), kind="stable"), kind="stable")
        self.weight: Float64 = np.asarray((rank + 10.0) ** -ZIPF_EXPONENT, dtype=np.float64)
        # A third of the catalogue exists from the start.
        release = np.maximum(uniform(fold(fold(key, 3), item)) * 1.5 - 0.5, 0.0)
        self.release = (FIRST_TIME + release * SPAN).astype(np.int64)
        self.by_time = _Shelf(np.zeros(num_items, dtype=np.int64), self.release, self.weight, 1)
        self.by_genre = _Shelf(self.genre, self.release, self.weight, len(GENRES))
        number = np.arange(SUCCESSORS)
        bits = fold(fold(fold(key, 4), item)[:, None], number)
        late = np.full((num_items, SUCCESSORS), FIRST_TIME + SPAN)
        genres = np.broadcast_to(self.genre[:, None], late.shape)
        self.successors = self.by_genre.draw(bits.ravel(), genres.ravel(), late.ravel()).reshape(late.shape)

    def metadata(self) -> pa.Table:
        genres = np.array(GENRES, dtype=object)[self.genre]
        titles = [f"Item {item + 1:05d} · {genre}" for item, genre in enumerate(genres)]
        return pa.table(
            {
                "item_id": pa.array(np.arange(1, self.num_items + 1)),
                "title": pa.array(titles),
                "genres": pa.array([[genre] for genre in genres]),
                "released": pa.array(self.release),
            }
        )


class _Shelf:
    """Items of each group in order of release with running weights: popularity draws among those already released."""

    def __init__(self, group: Int64, release: Int64, weight: Float64, num_groups: int) -> None:
        self.order = np.lexsort((release, group))
        self.key = group[self.order] * (2 * SPAN) + (release[self.order] - FIRST_TIME)
        self.running = np.concatenate([[0.0], np.cumsum(weight[self.order])])
        self.first = np.searchsorted(group[self.order], np.arange(num_groups + 1))

    def draw(self, bits: UInt64, group: Int64, now: Int64, since: Int64 | None = None) -> Int64:
        """An item of `group` released at `now` at the latest (and after `since`); any item where there is none."""
        last = np.searchsorted(self.key, group * (2 * SPAN) + np.minimum(now - FIRST_TIME, 2 * SPAN - 1), side="right")
        first = self.first[group]
        if since is not None:
            first = np.searchsorted(self.key, group * (2 * SPAN) + np.maximum(since - FIRST_TIME, 0))
        empty = last <= first
        first, last = np.where(empty, 0, first), np.where(empty, len(self.order), last)
        low, high = self.running[first], self.running[last]
        at = np.searchsorted(self.running, low + uniform(bits) * (high - low), side="right") - 1
        return self.order[np.clip(at, first, last - 1)]


def _normal(bits: UInt64) -> Float64:
    """Standard normal numbers by Box and Muller."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform(fold(bits, 1))))
    return radius * np.cos(2.0 * np.pi * uniform(fold(bits, 2)))


def _lengths(key: UInt64, mean_length: float) -> Int64:
    """Log-normal lengths of the given mean, long-tailed, at least MIN_LENGTH with repeats."""
    # Repeated items are dropped later, which takes a good third.
    location = np.log(max(mean_length, MIN_LENGTH) * 1.6) - SIGMA**2 / 2
    lengths = np.exp(location + SIGMA * _normal(key))
    return np.clip(lengths, MIN_LENGTH, MAX_LENGTH_FACTOR * mean_length).astype(np.int64)


def _times(key: UInt64, lengths: Int64) -> Int64:
    """Times of all events [sum of lengths]: sessions of minutes, days apart, from a random first day on."""
    users = np.repeat(np.arange(len(lengths)), lengths)
    place = ranges(np.zeros(len(lengths), dtype=np.int64), lengths)
    bits = fold(fold(key, 1)[users], place)
    session = uniform(fold(bits, 1)) < 0.12
    gap = np.where(session, 3 * 86_400.0, 240.0) * np.exp(0.8 * _normal(fold(bits, 2)))
    gap[place == 0] = 0
    elapsed = np.cumsum(gap)
    elapsed -= np.repeat(elapsed[np.cumsum(lengths) - lengths], lengths)
    duration = np.maximum(elapsed[np.cumsum(lengths) - 1], 1.0)
    # Whoever would outlast the span is sped up to end inside it.
    factor = np.minimum(1.0, 0.9 * SPAN / duration)
    begin = uniform(fold(key, 2)) * (SPAN - duration * factor)
    return (FIRST_TIME + begin[users] + elapsed * factor[users]).astype(np.int64)


def _block(world: _World, seed: int, first: int, last: int, mean_length: float) -> tuple[Int64, Int64, Int64]:
    """(user, item, time) of the events of users first <= u < last, each int64 [events]."""
    users = np.arange(first, last)
    key = fold(keyed(seed, string_key("synthetic/users")), users)
    lengths = _lengths(fold(key, 1), mean_length)
    order = np.argsort(-lengths, kind="stable")  # users still active at a position are then a prefix
    key, lengths, users = key[order], lengths[order], users[order]
    times = _times(fold(key, 2), lengths)
    starts = np.cumsum(lengths) - lengths
    interests = below(fold(fold(key, 3)[:, None], np.arange(INTERESTS)), len(GENRES))
    items = np.empty(len(times), dtype=np.int64)
    current = np.zeros(len(users), dtype=np.int64)
    for place in range(int(lengths[0])):
        active = int(np.searchsorted(-lengths, -place, side="left"))
        now = times[starts[:active] + place]
        bits = fold(fold(key[:active], 4), place)
        current = _next(world, bits, current[:active], interests[:active], now, place == 0)
        items[starts[:active] + place] = current
    owner = np.repeat(users, lengths)
    kept = _first_of_each(owner, items, world.num_items)
    return owner[kept], items[kept], times[kept]


def _next(world: _World, bits: UInt64, current: Int64, interests: Int64, now: Int64, start: bool) -> Int64:
    kind = uniform(fold(bits, 1))
    successor = world.successors[current, _skewed(fold(bits, 2), SUCCESSORS)]
    genre = interests[np.arange(len(current)), _skewed(fold(bits, 3), INTERESTS)]
    taste = world.by_genre.draw(fold(bits, 4), genre, now)
    everything = np.zeros_like(current)
    popular = world.by_time.draw(fold(bits, 5), everything, now)
    new = world.by_time.draw(fold(bits, 6), everything, now, now - NEW_WINDOW)
    follows = (kind < P_SUCCESSOR) & (world.release[successor] <= now) & (not start)
    kind = np.where(kind < P_SUCCESSOR, P_SUCCESSOR, kind)
    item = np.where(
        kind < P_SUCCESSOR + P_TASTE, taste, np.where(kind < P_SUCCESSOR + P_TASTE + P_POPULAR, popular, new)
    )
    return np.where(follows, successor, item)


def _skewed(bits: UInt64, choices: int) -> Int64:
    """0 with about half of the probability, 1 with half of the rest, ..."""
    levels = np.cumsum(2.0 ** -np.arange(1, choices + 1))
    return np.searchsorted(levels / levels[-1], uniform(bits), side="right").astype(np.int64)


def _first_of_each(owner: Int64, items: Int64, num_items: int) -> Int64:
    """Indices of the events that are the first of their user with their item, ascending."""
    return np.sort(np.unique(owner * num_items + items, return_index=True)[1])
