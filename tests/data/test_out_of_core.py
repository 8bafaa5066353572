"""Law: a log that is grouped out of core gives the very files of the log read whole, also after any kill."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from grzoo.data.prepare import out_of_core, prepare, splits, stream, writer
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("duckdb")
EVENTS = 5000


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts, batches, shards and row groups of a small log."""
    monkeypatch.setattr(stream, "BATCH", 500)
    monkeypatch.setattr(stream, "_CSV_BLOCK", 40_000)
    monkeypatch.setattr(out_of_core, "PART_EVENTS", 1500)
    monkeypatch.setattr(out_of_core, "_SORTED_BATCH", 400)
    monkeypatch.setattr(writer, "EVENTS_PER_SHARD", 2500)
    monkeypatch.setattr(writer, "EVENTS_PER_ROW_GROUP", 800)
    monkeypatch.setattr(splits, "_CHUNK", 700)


def table(ids: type, seed: int = 0) -> pa.Table:
    """Few users have most events; many ties in time; a feature with nulls, one without, one of floats."""
    generator = np.random.default_rng(seed)
    users, items = generator.zipf(1.4, EVENTS) % 300, generator.integers(-50, 50, EVENTS)
    clicks = generator.integers(0, 9, EVENTS)
    columns = {
        "user_id": [f"u{u}" for u in users] if ids is str else users,
        "item_id": [f"i{i}" for i in items] if ids is str else items,
        "time": generator.integers(0, 2000, EVENTS),
        "click": pa.array(clicks, mask=clicks == 3),
        "price": generator.random(EVENTS),
        "kind": clicks,
        "unused": ["x"] * EVENTS,
    }
    return pa.table(columns)


OPTIONS = {"timestamp_column": "time", "feature_columns": ["click", "price", "kind"]}


def write(folder: Path, log: pa.Table, form: str) -> Path:
    folder.mkdir()
    if form == "csv":
        pcsv.write_csv(log, folder / "log.csv")
        return folder / "log.csv"
    pq.write_table(log.slice(0, 2345), folder / "a.parquet", row_group_size=700)
    pq.write_table(log.slice(2345), folder / "b.parquet")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def both(tmp_path: Path, source: Path, **options: Any) -> tuple[dict[str, bytes], dict[str, bytes]]:
    prepare("event_log", tmp_path / "whole" / "out", source, **options)
    prepare("event_log", tmp_path / "parts" / "out", source, max_memory_gb=0.6, **options)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["out"], "the folder of work is gone"
    return contents(tmp_path / "whole" / "out"), contents(tmp_path / "parts" / "out")


@pytest.mark.parametrize("ids", [int, str])
@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize(
    "options",
    [
        {**OPTIONS, "validation": "last"},
        {**OPTIONS, "split": "temporal", "validation": "last", "id_mapping": "vocabulary"},
        {"split": "none"},
    ],
)
def test_the_files_are_the_same(tmp_path: Path, ids: type, form: str, options: dict[str, Any]) -> None:
    whole, parts = both(tmp_path, write(tmp_path / "raw", table(ids), form), **options)
    assert parts.keys() == whole.keys() and "lengths.png" in whole and sum("train" in name for name in whole) > 1
    assert parts == whole


ODD_NAMES = ["item code", "item_code", "Label", "label", "a/b", 'x"; y', "row", "../up", "feature 0"]


def test_a_feature_may_have_any_name(tmp_path: Path) -> None:
    log = table(int)
    for number, name in enumerate(ODD_NAMES):
        log = log.append_column(name, pa.array(np.random.default_rng(number).integers(0, 5, EVENTS)))
    source = write(tmp_path / "raw", log, "parquet")
    whole, parts = both(tmp_path, source, timestamp_column="time", feature_columns=ODD_NAMES)
    assert parts == whole and sorted(path.name for path in tmp_path.iterdir()) == ["parts", "raw", "whole"]


def test_a_column_that_is_not_asked_for_may_hold_anything(tmp_path: Path) -> None:
    """Its first block is of integers, its last value is text."""
    log = table(int).set_column(6, "unused", pa.array([*map(str, range(EVENTS - 1)), "x"]))
    source = write(tmp_path / "raw", log, "csv")
    text = source.read_text().replace('"', "")  # else all of the column is text
    source.write_text(text)
    whole, parts = both(tmp_path, source, **OPTIONS)
    assert parts == whole


@pytest.mark.parametrize("name", ["out[1]", "out*?", "user=3", "it's"])
def test_the_output_may_lie_anywhere(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "raw", table(int), "parquet")
    whole, parts = both(tmp_path, source, **OPTIONS)
    prepare("event_log", tmp_path / name / name, source, max_memory_gb=0.6, **OPTIONS)
    assert contents(tmp_path / name / name) == whole


def test_a_full_disk_is_told_before_the_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with holes would kill the process (SIGBUS) in the midst of it."""
    out_of_core._mapped(tmp_path / "column", np.int64, 10_000, False)
    assert (tmp_path / "column").stat().st_blocks * 512 >= 80_000
    out_of_core._mapped(tmp_path / "column", np.int64, 10_000, False)[:] = 7
    assert (out_of_core._mapped(tmp_path / "column", np.int64, 10_000, True) == 7).all()

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    source = write(tmp_path / "raw", table(int), "parquet")
    with pytest.raises(OSError, match=r"No space left.*make room.*goes on where it was"):
        prepare("event_log", tmp_path / "out", source, max_memory_gb=0.6)
    assert (tmp_path / "out.preparing" / "users.parquet").exists()


def test_titles_join_the_catalogue(tmp_path: Path) -> None:
    metadata = tmp_path / "items.csv"
    pcsv.write_csv(pa.table({"item_id": np.arange(-9, 9), "title": [f"t{k}" for k in range(18)]}), metadata)
    source = write(tmp_path / "raw", table(int), "parquet")
    whole, parts = both(tmp_path, source, item_metadata=str(metadata), **OPTIONS)
    assert parts == whole and "title" in pq.read_schema(tmp_path / "parts/out/items.parquet").names


def stops(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    """`call`, killed after so many of its calls."""
    left = [after]

    def stopping(*arguments: Any, **options: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return call(*arguments, **options)

    return stopping


@pytest.mark.parametrize(
    ("module", "name", "after"),
    [
        (out_of_core, "_write", 0),
        (out_of_core, "_write", 2),
        (out_of_core.OutOfCore, "_keys", 1),
        (out_of_core, "_write_text", 0),
        (out_of_core, "_write_text", 2),
        (out_of_core, "whole_feature", 25),
        (writer, "write_shard", 3),
        (writer, "pq.write_table", 0),
    ],
)
def test_a_killed_call_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, after: int
) -> None:
    source = write(tmp_path / "raw", table(str), "parquet")
    prepare("event_log", tmp_path / "whole", source, **OPTIONS)
    with monkeypatch.context() as patch:
        owner, _, attribute = name.rpartition(".")
        owner = getattr(module, owner) if owner else module
        patch.setattr(owner, attribute, stops(getattr(owner, attribute), after))
        with pytest.raises(KeyboardInterrupt):
            prepare("event_log", tmp_path / "out", source, max_memory_gb=0.6, **OPTIONS)
    assert not (tmp_path / "out").exists()
    work = tmp_path / "out.preparing"
    kept = [*work.glob("parts/0*"), *work.glob("folder/data/t*")]
    for path in kept:
        os.utime(path, ns=(5, 5))
    untouched: list[bool] = []
    monkeypatch.setattr(
        out_of_core.OutOfCore, "discard", lambda self: untouched.extend(x.stat().st_mtime_ns == 5 for x in kept[:1])
    )
    prepare("event_log", tmp_path / "out", source, max_memory_gb=0.6, **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all(untouched) and (after == 0 or kept)


def test_sigkill_leaves_no_dataset_and_no_lost_work(tmp_path: Path) -> None:
    source = write(tmp_path / "raw", table(int), "parquet")
    code = (
        "import os, sys, grzoo.data.prepare as p\n"
        "p.write_items = lambda *a: os.kill(os.getpid(), 9)\n"
        "p.prepare('event_log', sys.argv[1], sys.argv[2], max_memory_gb=0.6)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(source)]
    assert subprocess.run(command, capture_output=True).returncode == -9
    assert not (tmp_path / "out").exists() and (tmp_path / "out.preparing" / "sorted").exists()
    prepare("event_log", tmp_path / "out", source, max_memory_gb=0.6)
    prepare("event_log", tmp_path / "whole", source)
    names = {"schema.json", "items.parquet", "README.md", "lengths.png"}
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert {name: parts[name] for name in names} == {name: whole[name] for name in names}


def test_another_call_does_not_take_up_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "raw", table(int), "parquet")
    with monkeypatch.context() as patch:
        patch.setattr(out_of_core.OutOfCore, "_sort", stops(out_of_core.OutOfCore._sort, 0))
        with pytest.raises(KeyboardInterrupt):
            prepare("event_log", tmp_path / "out", source, max_memory_gb=0.6)
    with pytest.raises(ValueError, match=r"out.preparing holds the unfinished preparation of another log.*delete"):
        prepare("event_log", tmp_path / "out", source, max_memory_gb=0.6, split="none")
    prepare("event_log", tmp_path / "out", source, max_memory_gb=1)
    assert not (tmp_path / "out.preparing").exists()


def drifted(log: pa.Table, name: str, values: Any) -> pa.Table:
    return log.set_column(log.column_names.index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("time", np.full(EVENTS, np.nan), "b.parquet: event 2346 has timestamp nan: drop or repair"),
        ("time", np.full(EVENTS, -3), "event 2346 of .*raw has timestamp -3; timestamps are seconds since 1970"),
        ("user_id", ["a"] * EVENTS, "b.parquet: user is of type string, in the files before it int64"),
        ("item_id", [None] * EVENTS, "item"),
        ("click", np.full(EVENTS, 0.5), "b.parquet: click is of type float, in the files before it int64"),
        ("click", ["x"] * EVENTS, "b.parquet: feature 'click' is of type string; features are numbers"),
    ],
)
def test_bad_logs_are_named_and_leave_nothing(tmp_path: Path, name: str, values: Any, message: str) -> None:
    source = write(tmp_path / "raw", table(int), "parquet")
    pq.write_table(drifted(table(int), name, values).slice(2345), source / "b.parquet")
    with pytest.raises(ValueError, match=message):
        prepare("event_log", tmp_path / "out", source, max_memory_gb=0.6, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_corrupt_file_and_other_impossible_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "raw", table(int), "parquet")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="k_core needs the whole log in memory"):
        prepare("event_log", out, source, max_memory_gb=0.6, k_core=5)
    with pytest.raises(ValueError, match="max_memory_gb must be at least 0.6, got 0.1"):
        prepare("event_log", out, source, max_memory_gb=0.1)
    with pytest.raises(ValueError, match="a.parquet has no column 'when'; it has user_id"):
        prepare("event_log", out, source, max_memory_gb=0.6, timestamp_column="when")
    monkeypatch.setattr(out_of_core, "raw_batches", None)  # the events are not read for these
    with pytest.raises(ValueError, match="a temporal split needs timestamps"):
        prepare("event_log", out, source, max_memory_gb=0.6, split="temporal")
    with pytest.raises(FileNotFoundError, match="no_such"):
        prepare("event_log", out, source, max_memory_gb=0.6, item_metadata=str(tmp_path / "no_such.csv"))
    (tmp_path / "log.jsonl").write_text('{"user_id": 1, "item_id": 2}\n')
    with pytest.raises(ValueError, match="log.jsonl cannot be read in parts: leave max_memory_gb away"):
        prepare("event_log", out, tmp_path / "log.jsonl", max_memory_gb=0.6)
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ValueError, match="needs DuckDB: pip install"):
        prepare("event_log", out, source, max_memory_gb=0.6)
    assert not (tmp_path / "out.preparing").exists()
    monkeypatch.undo()
    data = (source / "b.parquet").read_bytes()
    (source / "b.parquet").write_bytes(data[:1000] + b"\0" * 200 + data[1200:])
    with pytest.raises(ValueError, match="b.parquet"):
        prepare("event_log", out, source, max_memory_gb=0.6)
    with pytest.warns(UserWarning, match="max_memory_gb has no effect on synthetic"):
        prepare("synthetic", out, max_memory_gb=1, num_users=20, num_items=30, mean_length=6.0)


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=80), st.data())
def test_kth_smallest_is_that_of_a_sort(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values) - 1))
    assert splits.kth_smallest(np.array(values), k) == sorted(values)[k]
