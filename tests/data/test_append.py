"""A row of a day is complete, its past is context only, and the days together hold every event as a target once."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from grzoo.data import Catalogue, EventDataset
from grzoo.data.prepare import EventLog, HistoryStore, PrepareConfig, append_day, days, prepare_log
from grzoo.data.prepare import append as module
from grzoo.data.windows import RecentFirst, trained_positions


def log(events: list[tuple[int, str, int]]) -> EventLog:
    """(user, item, time) events."""
    users, items, times = zip(*events, strict=True)
    return EventLog(pa.array(users), pa.array(items), np.array(times, dtype=np.int64), source="test")


def base(folder: Path, events: list[tuple[int, str, int]], mapping: str = "vocabulary") -> Path:
    prepare_log(log(events), PrepareConfig(name="x", output_dir=str(folder), split="none", id_mapping=mapping))
    return folder


DAYS = [
    [(1, "a", 10), (1, "b", 20), (2, "a", 15), (3, "c", 5)],
    [(1, "c", 30), (4, "d", 31), (4, "a", 33), (2, "d", 30)],
    [(4, "b", 40), (1, "a", 41), (1, "e", 42)],
]


@pytest.mark.parametrize("mapping", ["vocabulary", "hash"])
def test_rows_are_complete_and_the_past_is_context(tmp_path: Path, mapping: str) -> None:
    folder = base(tmp_path / "data", DAYS[0], mapping)
    assert [append_day(folder, log(day)) for day in DAYS[1:]] == days(folder) == ["day_00001", "day_00002"]
    catalogue = Catalogue.from_folder(folder)
    last = EventDataset.from_folder(folder, "day_00002")
    rows = last.rows(np.arange(len(last)))
    assert last.user_ids().to_pylist() == [1, 4]
    assert catalogue.decode(rows["item_id"]) == ["a", "b", "c", "a", "e", "d", "a", "b"]
    assert rows["timestamp"].tolist() == [10, 20, 30, 41, 42, 31, 33, 40]
    assert last.target_from.tolist() == [3, 2]
    store = HistoryStore(folder).past(pa.array([3, 2, 9]))
    assert catalogue.decode(store["item_id"]) == ["c", "a", "d"] and store.offsets.tolist() == [0, 1, 3, 3]


def test_every_event_with_context_is_trained_once_over_the_days(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    times = np.arange(400)
    events = [(int(u), f"i{i}", int(t)) for u, i, t in zip(*generator.integers(0, 30, (2, 400)), times, strict=True)]
    folder = base(tmp_path / "data", events[:100])
    for first in (100, 150, 300):
        append_day(folder, log(events[first : {100: 150, 150: 300, 300: 400}[first]]))
    trained: list[tuple[int, int]] = []
    for name in ("train", *days(folder)):
        split = EventDataset.from_folder(folder, name)
        samples = RecentFirst(split, 1000).select(np.arange(len(split)))
        sample, event = trained_positions(samples)
        users = np.array(split.user_ids().to_pylist())
        trained += zip(users[samples.rows[sample]].tolist(), event.tolist(), strict=True)
    counts = np.bincount([user for user, _, _ in events], minlength=30)
    assert sorted(trained) == [(u, e) for u, n in enumerate(counts.tolist()) for e in range(1, n)]


def test_the_catalogue_grows_and_known_ids_stay(tmp_path: Path) -> None:
    folder = base(tmp_path / "data", DAYS[0])
    before = Catalogue.from_folder(folder)
    append_day(folder, log(DAYS[1]))
    after = Catalogue.from_folder(folder)
    assert after.ids[: len(before)].tolist() == before.ids.tolist() and len(after) == len(before) + 1
    assert dict(zip(after.original_ids.to_pylist(), after.counts.tolist(), strict=True)) == dict(a=3, b=1, c=2, d=2)


def test_a_killed_call_is_repeated_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base(tmp_path / "data", DAYS[0])
    monkeypatch.setattr(module, "_extend_card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        append_day(folder, log(DAYS[1]))
    assert days(folder) == []
    monkeypatch.undo()
    assert append_day(folder, log(DAYS[1])) == "day_00001"
    catalogue = Catalogue.from_folder(folder)
    assert catalogue.counts.sum() == len(DAYS[0]) + len(DAYS[1])
    assert "day_00001" in (folder / "README.md").read_text()


def test_bad_days(tmp_path: Path) -> None:
    folder = base(tmp_path / "data", DAYS[0])
    with pytest.raises(ValueError, match="user 1 has a new event at 19, before the last one at 20"):
        append_day(folder, log([(1, "a", 19)]))
    with pytest.raises(ValueError, match=r"columns \['item_id'\], the folder has \['item_id', 'timestamp'\]"):
        append_day(folder, EventLog(pa.array([1]), pa.array(["a"])))
    with pytest.raises(ValueError, match="int64, those of the catalogue are string"):
        append_day(folder, EventLog(pa.array([1]), pa.array([3]), np.array([50])))
    assert days(folder) == [] and not list(folder.glob("data/day*"))
