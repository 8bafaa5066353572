"""Law: periods part the log by its calendar, and what is called new or popular is so by earlier events alone."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from grzoo.data import Catalogue, EventDataset
from grzoo.data.prepare import EventLog, days
from grzoo.recipes.periods import PeriodLog, WalkArguments
from grzoo.recipes.runtime import UserError


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


EVENTS = [
    (1, "a", "2020-01-05"),
    (1, "b", "2020-01-31T23:59:59"),
    (2, "a", "2020-02-01"),
    (1, "c", "2020-02-29"),
    (3, "c", "2020-04-01"),
    (2, "d", "2020-04-02"),
    (2, "c", "2020-04-03"),
]


def log(events: list[tuple[int, str, str]] = EVENTS) -> EventLog:
    users, items, times = zip(*events, strict=True)
    return EventLog(pa.array(users), pa.array(items), np.array([at(t) for t in times]), source="test")


def test_periods_follow_the_calendar_and_empty_ones_are_left_out() -> None:
    assert PeriodLog(log(), WalkArguments(walk_from="2020-02-20")).names == ["2020-02", "2020-04"]
    assert PeriodLog(log(), WalkArguments(period="day", walk_from="2020-04-02")).names == ["2020-04-02", "2020-04-03"]
    assert PeriodLog(log(), WalkArguments(walk_from="2020-02-01", walk_periods=1)).names == ["2020-02"]
    assert PeriodLog(log(), WalkArguments()).names == ["2020-02", "2020-04"], "half of the events lie before March"


def test_every_event_is_in_one_split_and_the_catalogue_grows(tmp_path: Path) -> None:
    periods = PeriodLog(log(), WalkArguments(walk_from="2020-02-01"))
    folder = tmp_path / "data"
    periods.make(folder, "x", resumed=False)
    sizes = [len(Catalogue.from_folder(folder))]
    for number in range(2):
        assert periods.append(folder, number) == periods.append(folder, number) == f"day_0000{number + 1}"
        sizes.append(len(Catalogue.from_folder(folder)))
    assert sizes == [2, 3, 4] and len(days(folder)) == 2
    last = EventDataset.from_folder(folder, "day_00002")
    rows = dict(zip(last.user_ids().to_pylist(), zip(last.lengths, last.target_from, strict=True), strict=True))
    assert rows == {3: (1, 1), 2: (3, 1)}


def test_what_was_before_is_counted_by_hand(tmp_path: Path) -> None:
    periods = PeriodLog(log(), WalkArguments(walk_from="2020-02-01"))
    periods.make(tmp_path / "data", "x", resumed=False)
    for number, month in enumerate(("2020-02", "2020-04")):
        periods.append(tmp_path / "data", number)
        catalogue = Catalogue.from_folder(tmp_path / "data")
        expected = Counter(item for _, item, time in EVENTS if time[:7] < month)
        counts = dict(zip(catalogue.original_ids.to_pylist(), periods.counts_before(catalogue, number), strict=True))
        assert counts == {item: expected[item] for item in catalogue.original_ids.to_pylist()}
    assert periods.describe(1) == {
        "events": 3,
        "users": 2,
        "new_users": 1,
        "items": 2,
        "new_items": 1,
        "share_of_events_on_new_items": pytest.approx(1 / 3),
    }


def test_a_walk_goes_on_in_its_own_folder_only(tmp_path: Path) -> None:
    periods = PeriodLog(log(), WalkArguments(walk_from="2020-02-01"))
    periods.make(tmp_path / "data", "x", resumed=False)
    periods.append(tmp_path / "data", 0)
    periods.make(tmp_path / "data", "x", resumed=True)
    assert len(days(tmp_path / "data")) == 1
    with pytest.raises(UserError, match="is not of the walk that is resumed"):
        PeriodLog(log(), WalkArguments(walk_from="2020-04-01")).make(tmp_path / "data", "x", resumed=True)
    periods.make(tmp_path / "data", "x", resumed=False)
    assert days(tmp_path / "data") == [], "a new walk begins with a new folder"


def test_bad_walks() -> None:
    with pytest.raises(UserError, match="leaves no event before or none after"):
        PeriodLog(log(), WalkArguments(walk_from="2019-01-01"))
    with pytest.raises(UserError, match="'soon' is not a date"):
        PeriodLog(log(), WalkArguments(walk_from="soon"))
    with pytest.raises(UserError, match="has no times"):
        PeriodLog(EventLog(pa.array([1]), pa.array([2]), source="x"), WalkArguments())
