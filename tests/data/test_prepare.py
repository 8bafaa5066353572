"""Grouping, splits and writing: against slow references, and complete or absent."""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grzoo.data import Catalogue, DatasetSchema, EventDataset
from grzoo.data.prepare import EventLog, PrepareConfig, duplicates, prepare, prepare_log
from grzoo.data.prepare.log import group, k_core
from grzoo.data.prepare.splits import split_log
from grzoo.data.prepare.writer import new_folder
from hypothesis import given
from hypothesis import strategies as st

EVENTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 12)), min_size=8, max_size=60)


def log_of(events: list[tuple[int, int, int]], times: bool = True) -> EventLog:
    columns = list(zip(*events, strict=True))
    return EventLog(
        users=pa.array(columns[0]),
        items=pa.array(columns[1]),
        timestamps=np.array(columns[2], dtype=np.int64) if times else None,
        source="the test",
    )


def config(folder: Path | str = "unused", **options: Any) -> PrepareConfig:
    return PrepareConfig(name="test", output_dir=str(folder), **options)


def reference_groups(events: list[tuple[int, int, int]]) -> dict[int, list[tuple[int, int]]]:
    """(time, item) of each user, sorted by time; Python's sort is stable."""
    users = defaultdict(list)
    for user, item, time in events:
        users[user].append((time, item))
    return {user: sorted(users[user], key=lambda event: event[0]) for user in sorted(users)}


@given(EVENTS)
def test_group_sorts_by_time_and_keeps_ties_in_file_order(events: list[tuple[int, int, int]]) -> None:
    grouped, expected = group(log_of(events)), reference_groups(events)
    assert grouped.user_ids.to_pylist() == list(expected)
    for row, history in enumerate(expected.values()):
        part = slice(grouped.offsets[row], grouped.offsets[row + 1])
        assert grouped.columns["item_id"][part].tolist() == [item for _, item in history]
        assert grouped.columns["timestamp"][part].tolist() == [time for time, _ in history]


def test_huge_time_spans_are_sorted_too() -> None:
    grouped = group(log_of([(9, 1, 2**62), (9, 2, 0), (1, 3, 5), (9, 4, 2**62)]))
    assert grouped.columns["item_id"].tolist() == [3, 2, 1, 4]


@given(EVENTS, st.sampled_from(["none", "last"]))
def test_leave_one_out(events: list[tuple[int, int, int]], validation: str) -> None:
    lengths = {user: len(history) for user, history in reference_groups(events).items()}
    held_out = 1 if validation == "none" else 2
    tested = [(row, n) for row, n in enumerate(lengths.values()) if n > held_out]
    grouped = group(log_of(events))
    if not tested:
        with pytest.raises(ValueError, match="split '.*' is empty"):
            split_log(grouped, config(validation=validation))
        return
    split = split_log(grouped, config(validation=validation))
    assert list(split.rows) == (["train", "test"] if validation == "none" else ["train", "validation", "test"])
    train, test = split.rows["train"], split.rows["test"]
    assert train.length.tolist() == [n - held_out if n > held_out else n for n in lengths.values()]
    assert set(train.target_from.tolist()) == {1}
    assert list(zip(test.user, test.length, test.target_from, strict=True)) == [(u, n, n - 1) for u, n in tested]
    if validation == "last":
        part = split.rows["validation"]
        assert list(zip(part.user, part.length, part.target_from, strict=True)) == [
            (u, n - 1, n - 2) for u, n in tested
        ]
    short = len(lengths) - len(tested)
    assert bool(split.remarks) == bool(short) and (not short or split.remarks[0].startswith(f"{short} users"))


@given(EVENTS, st.sampled_from(["none", "last"]), st.one_of(st.none(), st.integers(1, 12)))
def test_temporal(events: list[tuple[int, int, int]], validation: str, cutoff: int | None) -> None:
    grouped, groups = group(log_of(events)), list(reference_groups(events).values())
    try:
        split = split_log(grouped, config(split="temporal", validation=validation, cutoff=cutoff, test_fraction=0.2))
    except ValueError as error:
        assert "cutoff" in str(error)
        return
    bounds = {"test": split.arguments["cutoff"], "validation": split.arguments.get("validation_cutoff")}
    first = bounds["validation"] if validation == "last" else bounds["test"]
    train = {row: sum(t < first for t, _ in history) for row, history in enumerate(groups)}
    assert dict(zip(split.rows["train"].user.tolist(), split.rows["train"].length.tolist(), strict=True)) == {
        row: n for row, n in train.items() if n
    }
    end = {"validation": bounds["test"], "test": np.inf}
    for name in split.rows.keys() - {"train"}:
        expected = {}
        for row, history in enumerate(groups):
            before = sum(t < bounds[name] for t, _ in history)
            upto = sum(t < end[name] for t, _ in history)
            if upto > max(before, 1):
                expected[row] = (upto, max(before, 1))
        part = split.rows[name]
        found = zip(part.user.tolist(), part.length.tolist(), part.target_from.tolist(), strict=True)
        assert {user: (n, t) for user, n, t in found} == expected


def test_k_core_is_the_fixed_point() -> None:
    events = [(u, i, 0) for u in range(4) for i in range(4)] + [(0, 9, 0), (7, 9, 0), (7, 0, 0), (8, 9, 0)]
    kept = k_core(log_of(events), 3)
    assert len(kept) == 16 and set(kept.items.to_pylist()) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="k_core=9 leaves no event of 20"):
        k_core(log_of(events), 9)


@pytest.mark.parametrize(
    ("mapping", "ids", "expected"),
    [(None, [5, -7], "identity"), ("vocabulary", [5, -7], "vocabulary"), (None, ["x", "y"], "hash")],
)
def test_items_keep_their_original_ids(tmp_path: Path, mapping: str | None, ids: list[Any], expected: str) -> None:
    metadata = pa.table({"item_id": [ids[1]], "title": ["second"]})
    items = pa.array([ids[0], ids[1], ids[0], ids[0]])
    log = EventLog(users=pa.array(["u", "u", "v", "v"]), items=items, item_metadata=metadata)
    prepare_log(log, config(tmp_path / "out", id_mapping=mapping))
    catalogue, schema = Catalogue.from_folder(tmp_path / "out"), DatasetSchema.load(tmp_path / "out")
    assert schema.id_mapping == catalogue.id_mapping == expected and schema.user_id_dtype == "string"
    dataset = EventDataset.from_folder(tmp_path / "out", "test")
    assert dataset.user_ids().to_pylist() == ["u", "v"]
    assert catalogue.decode(dataset.rows([0, 1])["item_id"]) == [ids[0], ids[1], ids[0], ids[0]]
    table = {row["item_id"]: row for row in catalogue.table.to_pylist()}
    assert table[ids[0]]["count"] == 2 and table[ids[1]]["count"] == 0, "counts are of train events"
    assert table[ids[1]]["title"] == "second" and table[ids[0]]["title"] is None


def test_mappings_that_do_not_fit_the_ids() -> None:
    with pytest.raises(
        ValueError, match="id_mapping is 'hash', but the item ids are integers: choose identity or vocab"
    ):
        group(log_of([(0, 1, 2)]), "hash")
    with pytest.raises(ValueError, match="id_mapping is 'identity', but the item ids are text"):
        group(EventLog(users=pa.array([1]), items=pa.array(["a"])), "identity")


def test_colliding_hashes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grzoo.data.prepare.log.hash_ids", lambda names: np.zeros(len(names), dtype=np.int64))
    with pytest.raises(ValueError, match="'a' and 'b' have the same hash: use id_mapping vocabulary"):
        group(EventLog(users=pa.array([1, 1]), items=pa.array(["a", "b"])))


def test_logs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="no events in the test"):
        EventLog(users=pa.array([], pa.int64()), items=pa.array([], pa.int64()), source="the test")
    with pytest.raises(ValueError, match="event 2 has no item id"):
        EventLog(users=pa.array([1, 2]), items=pa.array([1, None]))
    with pytest.raises(ValueError, match="user ids are of type double"):
        EventLog(users=pa.array([1.5]), items=pa.array([1]))
    with pytest.raises(ValueError, match="event 2 of the test has timestamp -4"):
        log_of([(0, 0, 1), (0, 0, -4)])


def test_one_event_per_user_has_nothing_to_hold_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one event per user"):
        prepare_log(log_of([(0, 1, 1), (1, 1, 1)]), config(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_two_events_per_user_are_too_few_for_validation_and_test(tmp_path: Path) -> None:
    log = log_of([(0, 1, 1), (0, 2, 2), (1, 1, 1), (1, 2, 2)])
    with pytest.raises(ValueError, match="no user has the 3 events .*; use validation none"):
        prepare_log(log, config(tmp_path / "out", validation="last"))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_temporal_split_of_a_few_events_tests_the_last(size: int) -> None:
    split = split_log(group(log_of([(0, item, item) for item in range(size)])), config(split="temporal"))
    assert split.arguments["cutoff"] == size - 1
    assert split.rows["test"].target_from.tolist() == [size - 1]


def test_a_user_with_one_event_is_in_train_only(tmp_path: Path) -> None:
    report = prepare_log(log_of([(0, 1, 1), (1, 1, 1), (1, 2, 2)]), config(tmp_path / "out"))
    assert "1 users with fewer than 2 events are in train only" in report.lines()
    assert EventDataset.from_folder(tmp_path / "out", "train").lengths.tolist() == [1, 1]
    assert EventDataset.from_folder(tmp_path / "out", "test").user_ids().to_pylist() == [1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("grzoo.data.prepare.write_items", fail)
    with pytest.raises(error):
        prepare_log(log_of([(0, 1, 1), (0, 2, 2)]), config(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_killed_write_leaves_no_dataset(tmp_path: Path) -> None:
    code = (
        "import os, grzoo.data.prepare as p\n"
        "p.write_items = lambda *a: os.kill(os.getpid(), 9)\n"
        f"p.prepare('synthetic', {str(tmp_path / 'out')!r}, num_users=20, num_items=30, mean_length=6)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    assert not (tmp_path / "out").exists()
    prepare("synthetic", tmp_path / "out", num_users=20, num_items=30, mean_length=6.0)
    assert (tmp_path / "out" / "schema.json").is_file()


def test_existing_folders_are_replaced_only_when_asked(tmp_path: Path) -> None:
    log, folder = log_of([(0, 1, 1), (0, 2, 2)]), tmp_path / "out"
    prepare_log(log, config(folder))
    with pytest.raises(ValueError, match="exists and is not empty: choose another folder, or overwrite it"):
        prepare_log(log, config(folder))
    prepare_log(log_of([(0, 1, 1), (0, 2, 2), (0, 3, 3)]), config(folder, overwrite=True))
    assert EventDataset.from_folder(folder, "test").lengths.tolist() == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (folder / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match="out holds checkpoint-4, not written by preparation"):
        prepare_log(log, config(folder, overwrite=True))
    assert (folder / "checkpoint-4").is_dir()
    (folder / "checkpoint-4").rmdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not a dataset folder"):
        prepare_log(log, config(tmp_path / "mine", overwrite=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"), new_folder(tmp_path / "file"):
        pass


def test_options_without_effect_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="option user_column has no effect on synthetic"):
        prepare("synthetic", tmp_path / "out", num_users=20, num_items=30, mean_length=6.0, user_column="u")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoff": 5}, "cutoff has no effect with split leave_one_out: it is for split temporal"),
        ({"test_fraction": 0.2}, "test_fraction has no effect with split leave_one_out"),
        ({"split": "temporal", "cutoff": 3, "test_fraction": 0.2}, "test_fraction has no effect beside a cutoff"),
        ({"split": "none", "validation": "last"}, "validation has no effect with split none"),
        ({"timestamp_column": None, "timestamp_unit": "ms"}, "timestamp_unit has no effect without a timestamp_column"),
        ({"timestamp_unit": "ms"}, "timestamp_unit ms has no effect: .*log.csv has times of a known unit"),
        ({"title_column": "name"}, "title_column has no effect without item_metadata"),
        ({"item_metadata_id": "name"}, "item_metadata_id has no effect without item_metadata"),
        ({"k_core": 1}, "k_core has no effect when it is 1"),
        ({"category": "Books"}, "option category has no effect on event_log"),
    ],
)
def test_options_that_others_leave_without_effect_are_told(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    rows = ["user_id,item_id,t", *(f"{user},{item},1970-01-01 00:00:0{item}" for user in (1, 2) for item in (1, 2, 3))]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    with pytest.warns(UserWarning, match=message) as told:
        prepare("event_log", tmp_path / "out", tmp_path / "log.csv", **{"timestamp_column": "t", **options})
    assert len(told) == 1


def test_what_other_logs_do_not_read_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="option source has no effect on synthetic"):
        prepare("synthetic", tmp_path / "out", "raw", num_users=20, num_items=30, mean_length=6.0)
    with pytest.warns(UserWarning, match="option category has no effect on amazon-beauty"):
        with pytest.raises(FileNotFoundError, match="Beauty.txt"):
            prepare("amazon-beauty", tmp_path / "other", tmp_path, category="Books")


@given(EVENTS, st.integers(1, 40))
def test_duplicates_are_counted_as_in_a_set(events: list[tuple[int, int, int]], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_CHUNK", chunk)
        assert duplicates.count_duplicates(group(log_of(events))) == len(events) - len(set(events))
    assert duplicates.count_duplicates(group(log_of(events, times=False))) == 0


def test_duplicates_are_told_and_kept(tmp_path: Path) -> None:
    events = [(1, 5, 10), (1, 6, 10), (1, 5, 10), (2, 5, 10), (2, 5, 11), (1, 5, 10)]
    report = prepare_log(log_of(events), config(tmp_path / "out"))
    assert any(line.startswith("2 events have the user, item and time of another one") for line in report.lines())
    statistics = DatasetSchema.load(tmp_path / "out").statistics
    assert (statistics["duplicate_events"], statistics["events"]) == (2, 6)
    clean = prepare_log(log_of([*dict.fromkeys(events)]), config(tmp_path / "clean"))
    assert not any("another one" in line for line in clean.lines()) and clean.statistics["duplicate_events"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_core": -1}, "k_core must be at least 0, got -1"),
        ({"mean_length": 0.0}, "mean_length must be positive, got 0.0"),
        ({"name": "movies"}, "no data set 'movies'; there are .*ml-1m"),
        ({"split": "random"}, "split is 'random'; it is one of leave_one_out, temporal"),
        ({"validation": "first"}, "validation is 'first'"),
        ({"test_fraction": 0.7}, "test_fraction must lie between 0 and 0.5, got 0.7"),
        ({"num_users": 0}, "num_users must be at least 1, got 0"),
        ({"split": "temporal", "cutoff": 5}, "cutoff 5 leaves 0 train and"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(**{"name": "synthetic", "output_dir": tmp_path / "out", **options})
    assert not list(tmp_path.iterdir())


def test_the_folder_tells_what_it_holds(synthetic_folder: Path) -> None:
    schema, card = DatasetSchema.load(synthetic_folder), (synthetic_folder / "README.md").read_text()
    assert schema.split == {"kind": "leave_one_out", "validation": "last"}
    assert schema.statistics["users"] == 120
    assert (
        schema.statistics["splits"]["test"]["targets"] == len(EventDataset.from_folder(synthetic_folder, "test")) > 110
    )
    for line in ("120 users", "path: data/validation-*.parquet", "events per user: mean", "time span: 20"):
        assert line in card
    names = pq.read_schema(next((synthetic_folder / "data").glob("test-*"))).names
    assert names == ["user_id", "item_id", "timestamp", "target_from"]
