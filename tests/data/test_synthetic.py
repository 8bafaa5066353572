"""The synthetic log is a function of its seed, looks like a real one, and has something to learn."""

import numpy as np
import pytest
from grzoo.data.prepare import EventLog, PrepareConfig, synthetic


def read(**options: float) -> EventLog:
    return synthetic.read(PrepareConfig(name="synthetic", output_dir="unused", **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def log() -> EventLog:
    return read()


def test_it_is_deterministic() -> None:
    log, again, other = (read(num_users=50, seed=seed) for seed in (0, 0, 1))
    assert again.items.equals(log.items) and np.array_equal(again.timestamps, log.timestamps)
    assert not other.items.equals(log.items)


def test_a_user_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = read(num_users=30), read(num_users=90)
    monkeypatch.setattr(synthetic, "USERS_PER_BLOCK", 7)
    blocks = read(num_users=90)
    for user in (0, 11, 29):
        histories = [log.items.to_numpy()[log.users.to_numpy() == user].tolist() for log in (few, many, blocks)]
        assert histories[0] == histories[1] == histories[2]


def test_it_looks_like_a_real_log(log: EventLog) -> None:
    users, items = log.users.to_numpy(), log.items.to_numpy()
    lengths = np.bincount(users)
    assert len(lengths) == 2000 and 30 < lengths.mean() < 50
    assert lengths.max() > 5 * np.median(lengths), "long-tailed lengths"
    counts = np.sort(np.bincount(items))[::-1]
    assert counts[:100].sum() > 0.3 * counts.sum() and (counts > 0).sum() > 950, "few items are most of the events"
    assert len(np.unique(users * 10_000 + items)) == len(users), "nobody takes an item twice"
    assert log.timestamps is not None and (np.diff(log.timestamps)[np.diff(users) == 0] >= 0).all()


def test_items_appear_over_time(log: EventLog) -> None:
    assert log.item_metadata is not None and log.timestamps is not None
    released = log.item_metadata["released"].to_numpy()
    assert (log.timestamps >= released[log.items.to_numpy() - 1]).all()
    half = np.median(log.timestamps)
    early, late = (set(log.items.to_numpy()[mask].tolist()) for mask in (log.timestamps < half, log.timestamps >= half))
    assert len(late - early) > 100
    assert log.item_metadata["title"][41].as_py().startswith("Item 00042 · ")


def test_the_last_item_says_much_about_the_next(log: EventLog) -> None:
    """Hit rate at 10 of the most frequent followers of the last item against the most popular items."""
    users, items = log.users.to_numpy(), log.items.to_numpy()
    last = np.flatnonzero(np.append(np.diff(users) != 0, True))
    train = np.ones(len(items), dtype=bool)
    train[last] = False
    follow = np.zeros((1001, 1001))
    pairs = np.flatnonzero((np.diff(users) == 0) & train[1:])
    np.add.at(follow, (items[pairs], items[pairs + 1]), 1)
    popular = np.argsort(-np.bincount(items[train], minlength=1001), kind="stable")[:10]
    followers = np.argsort(-follow[items[last - 1]], axis=1, kind="stable")[:, :10]
    hits = (followers == items[last, None]).any(1).mean()
    assert hits > 4 * np.isin(items[last], popular).mean() > 0
