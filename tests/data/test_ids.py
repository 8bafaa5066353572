"""Law: two ids that are written differently stay two, however a log is written; what is no id is named."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grzoo.data import Catalogue, EventDataset
from grzoo.data.prepare import Report, prepare
from grzoo.data.prepare.readers import ids_of_text

CASES = [
    (["7", "12"], [7, 12]),
    (["7", " 12"], [7, 12]),
    (["-7", "0"], [-7, 0]),
    (["7", "007"], ["7", "007"]),
    (["31", "0x1F"], ["31", "0x1F"]),
    (["-0", "0"], ["-0", "0"]),
    (["18446744073709551615", "1"], ["18446744073709551615", "1"]),
    (["9223372036854775807", "-9223372036854775808"], [2**63 - 1, -(2**63)]),
    (["a", "7"], ["a", "7"]),
    (["7", "NA"], [7, None]),
    (["7", ""], [7, None]),
    (["1.5", "2"], [1.5, 2.0]),
]


@pytest.mark.parametrize(("text", "ids"), CASES)
def test_ids_of_text(text: list[str], ids: list[Any]) -> None:
    assert ids_of_text(pa.chunked_array([text[:1], text[1:]])).to_pylist() == ids


def write(path: Path, users: list[Any], items: list[Any]) -> Path:
    times = range(len(users))
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"user_id": users, "item_id": items, "t": list(times)}), path)
    elif path.suffix == ".jsonl":
        rows = [{"user_id": u, "item_id": i, "t": t} for u, i, t in zip(users, items, times, strict=True)]
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = ["user_id,item_id,t", *(f"{u},{i},{t}" for u, i, t in zip(users, items, times, strict=True))]
        path.write_text("\r\n".join(lines))
    return path


def prepared(source: Path, folder: Path, **options: Any) -> Report:
    return prepare("event_log", folder, source, timestamp_column="t", split="none", **options)


@pytest.mark.parametrize("memory", [None, 0.6])
def test_leading_zeros_keep_users_and_items_apart(tmp_path: Path, memory: float | None) -> None:
    if memory:
        pytest.importorskip("duckdb")
    source = write(tmp_path / "log.csv", ["007", "7", "7"], ["01", "1", "1"])
    report = prepared(source, tmp_path / "out", max_memory_gb=memory)
    dataset, catalogue = EventDataset.from_folder(tmp_path / "out", "train"), Catalogue.from_folder(tmp_path / "out")
    assert dict(zip(dataset.user_ids().to_pylist(), dataset.lengths, strict=True)) == {"007": 1, "7": 2}
    assert catalogue.original_ids.to_pylist() == ["01", "1"] and catalogue.counts.tolist() == [1, 2]
    assert "user ids are text, as integers would not keep '007' as it is written" in report.lines()
    assert "item ids are text, as integers would not keep '01' as it is written" in report.lines()


@pytest.mark.parametrize("memory", [None, 0.6])
def test_plain_integers_stay_integers(tmp_path: Path, memory: float | None) -> None:
    if memory:
        pytest.importorskip("duckdb")
    source = write(tmp_path / "log.csv", [7, 7, 10], [1, 2, 0])
    report = prepared(source, tmp_path / "out", max_memory_gb=memory)
    assert EventDataset.from_folder(tmp_path / "out", "train").user_ids().to_pylist() == [7, 10]
    assert not any("ids are text" in line for line in report.lines())


def test_zeros_that_appear_late_in_a_log_read_in_parts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("duckdb")
    monkeypatch.setattr("grzoo.data.prepare.stream._CSV_BLOCK", 1000)
    source = write(tmp_path / "log.csv", [*range(1000), "007"], [1] * 1001)
    with pytest.raises(ValueError, match="'user_id' is of type int64 first, string later.*convert the file to Parquet"):
        prepared(source, tmp_path / "out", max_memory_gb=0.6)
    late = write(tmp_path / "late.csv", ["007", *range(1000)], [1] * 1001)
    prepared(late, tmp_path / "out", max_memory_gb=0.6)
    assert len(EventDataset.from_folder(tmp_path / "out", "train")) == 1001


@pytest.mark.parametrize("name", ["log.csv", "log.parquet"])
def test_unsigned_ids_beyond_int64_are_kept_as_text(tmp_path: Path, name: str) -> None:
    large = 2**64 - 1
    users = pa.array([large, 7], pa.uint64()) if name.endswith("parquet") else [large, 7]
    report = prepared(write(tmp_path / name, users, [1, 2]), tmp_path / "out")
    assert EventDataset.from_folder(tmp_path / "out", "train").user_ids().to_pylist() == [str(large), "7"]
    assert f"user ids are text, as integers would not keep '{large}' as it is written" in report.lines()


@pytest.mark.parametrize("name", ["log.csv", "log.parquet", "log.jsonl"])
def test_an_empty_text_is_no_id(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / name, ["a", "", "b"], [1, 2, 3])
    with pytest.raises(ValueError, match="event 2 has no user id: fill it or drop the event"):
        prepared(source, tmp_path / "out")


def test_json_numbers_beyond_int64_name_the_remedy(tmp_path: Path) -> None:
    source = write(tmp_path / "log.jsonl", [2**64 - 1, 7], [1, 2])
    with pytest.raises(ValueError, match="user ids are of type double; they must be integers or text: convert them"):
        prepared(source, tmp_path / "out")


def test_metadata_join_by_the_ids_as_they_are_written(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", [1, 1, 1], ["007", "7", "8"])
    (tmp_path / "items.csv").write_text("item_id,title,name,title_of\n7,no,no,Seven\n007,no,no,Bond\n")
    report = prepared(source, tmp_path / "out", item_metadata=str(tmp_path / "items.csv"), title_column="title_of")
    table = Catalogue.from_folder(tmp_path / "out").table.to_pylist()
    assert {row["item_id"]: row["title"] for row in table} == {"007": "Bond", "7": "Seven", "8": None}
    assert "the item metadata have 2 of the 3 items: the others have no title" in report.lines()
    integers = write(tmp_path / "integers.csv", [1, 1], [7, 8])
    prepared(integers, tmp_path / "two", item_metadata=str(tmp_path / "items.csv"), title_column="title_of")
    assert [row["title"] for row in Catalogue.from_folder(tmp_path / "two").table.to_pylist()] == ["Seven", None]


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,item_id\n1,2,3\n")
    with pytest.raises(ValueError, match="several columns 'item_id': rename all but one"):
        prepare("event_log", tmp_path / "out", tmp_path / "log.csv")
