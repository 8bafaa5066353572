"""Rows read through the memory map equal what is in the Parquet files; files that do not fit the schema are refused."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grzoo.data import DatasetSchema, EventDataset, FeatureSpec
from grzoo.data.prepare import prepare_log, writer
from grzoo.data.prepare.config import PrepareConfig
from grzoo.data.prepare.log import EventLog

SPECS = (
    FeatureSpec(name="item_id", dtype="int64"),
    FeatureSpec(name="timestamp", dtype="int64"),
    FeatureSpec(name="rating", dtype="float32"),
)
ROWS: dict[str, Any] = {
    "user_id": [3, 4, 9, 5],
    "item_id": [[1, 2, 3], [], [4], [5, -6]],
    "timestamp": [[10, 20, 30], [], [5], [6, 7]],
    "rating": [[1.0, 2.0, 3.0], [], [0.5], [4.0, 5.0]],
    "target_from": [1, 1, 1, 0],
}


def write(folder: Path, rows: dict[str, Any], split: str = "train", shards: int = 1) -> None:
    """A dataset folder by hand, one row group per row."""
    DatasetSchema(name="x", features=SPECS, id_mapping="identity").save(folder)
    (folder / "data").mkdir(exist_ok=True)
    table = pa.table(rows)
    bounds = np.linspace(0, len(table), shards + 1).astype(int)
    for number, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        path = folder / "data" / f"{split}-{number:05d}-of-{shards:05d}.parquet"
        pq.write_table(table.slice(first, last - first), path, row_group_size=1)


@pytest.mark.parametrize("shards", [1, 3])
def test_rows_equal_the_files(tmp_path: Path, shards: int) -> None:
    write(tmp_path, ROWS, shards=shards)
    dataset = EventDataset.from_folder(tmp_path, "train")
    assert len(dataset) == 4 and dataset.num_events == 6
    assert dataset.lengths.dtype == np.int32 and dataset.lengths.tolist() == [3, 0, 1, 2]
    assert dataset.target_from.tolist() == ROWS["target_from"]
    assert dataset.feature_names == ("item_id", "timestamp", "rating") and dataset.features() == SPECS
    for order in ([0, 1, 2, 3], [3, 0, 3], [1], []):
        rows = dataset.rows(order)
        assert len(rows) == len(order)
        for name in dataset.feature_names:
            parts = [rows[name][a:b].tolist() for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)]
            assert parts == [ROWS[name][row] for row in order]
    assert dataset.rows([0])["rating"].dtype == np.float32
    assert dataset.gather([0, 3], [1, 0], [3, 1])["timestamp"].tolist() == [20, 30, 6]
    assert dataset.events([3, 0], [1, 2]).tolist() == [-6, 3]
    assert dataset.user_ids().to_pylist() == ROWS["user_id"]


def test_times_may_tie_within_a_row_and_fall_from_row_to_row(tmp_path: Path) -> None:
    rows = {
        "user_id": range(6),
        "item_id": [[], [1, 2, 3], [], [4, 5], [6], []],
        "timestamp": [[], [7, 7, 9], [], [3, 3], [1], []],
        "rating": [[], [1.0] * 3, [], [1.0] * 2, [1.0], []],
        "target_from": [1] * 6,
    }
    write(tmp_path, rows)
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path), path)  # all in one row group
    assert EventDataset.from_folder(tmp_path).rows(range(6))["timestamp"].tolist() == [7, 7, 9, 3, 3, 1]


def test_values_are_views_of_one_mapped_file(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    dataset = EventDataset.from_folder(tmp_path)
    assert not any(column.flags.owndata or column.flags.writeable for column in dataset._columns.values())
    (cache,) = (tmp_path / ".cache").glob("*.arrow")
    assert pa.ipc.open_file(pa.memory_map(str(cache))).read_all()["item_id"].to_pylist() == ROWS["item_id"]


def test_the_cache_is_made_once_and_renewed_with_the_files(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    EventDataset.from_folder(tmp_path)
    (cache,) = (tmp_path / ".cache").glob("*.arrow")
    made = cache.stat().st_mtime_ns
    assert EventDataset.from_folder(tmp_path).lengths.tolist() == [3, 0, 1, 2]
    assert cache.stat().st_mtime_ns == made
    write(tmp_path, {**ROWS, "item_id": [[7, 7, 7], [], [7], [7, 7]]})
    assert set(EventDataset.from_folder(tmp_path).rows([0, 3])["item_id"].tolist()) == {7}
    assert not cache.exists() and len(list((tmp_path / ".cache").glob("*.arrow"))) == 1
    assert not list((tmp_path / ".cache").glob("*.tmp-*"))


def test_a_read_only_folder_is_cached_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "data_set", tmp_path / "cache"
    folder.mkdir()
    write(folder, ROWS)
    (folder / ".cache").write_text("")  # nothing can be made at that name, for root neither
    monkeypatch.setenv("GRZOO_CACHE", str(elsewhere))
    assert EventDataset.from_folder(folder).num_events == 6
    assert list(elsewhere.glob("train-*.arrow"))


def test_a_copy_for_a_worker_opens_the_same_rows(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    for dataset in (EventDataset.from_folder(tmp_path), EventDataset.from_arrays({"item_id": [1, 2]}, [2])):
        twin = copy.deepcopy(dataset)
        assert twin.rows([0])["item_id"].tolist() == dataset.rows([0])["item_id"].tolist()


def test_arrays_in_memory_are_checked() -> None:
    with pytest.raises(ValueError, match="holds 3 events, the lengths add up to 2"):
        EventDataset.from_arrays({"item_id": [1, 2, 3]}, [2])
    with pytest.raises(ValueError, match="need a column item_id"):
        EventDataset.from_arrays({"item": [1]}, [1])
    with pytest.raises(ValueError, match="no original user ids"):
        EventDataset.from_arrays({"item_id": [1]}, [1]).user_ids()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestamp": [[10, 20], [], [5], [6, 7]]}, "row 0: 'timestamp' and item_id have unequal lengths"),
        ({"timestamp": [[10, 20, 30], [], [5], [6, -7]]}, "train-0.*parquet, row 3: negative timestamp -7.*repair"),
        ({"timestamp": [[10, 20, 30], [], [5], [7, 6]]}, "train-0.*parquet, row 3: timestamps fall: sort each history"),
        ({"timestamp": [[10, 30, 20], [], [5], [6, 7]]}, "row 0: timestamps fall"),
        ({"timestamp": [[10, 20, 30], [], [5], [6, float("nan")]]}, "row group 3.*'timestamp' is list.*double.*nan"),
        ({"rating": [[1.0, 2.0], [], [0.5], [4.0, 5.0]]}, "row 0: 'rating' and item_id have unequal lengths"),
        ({"item_id": [[1, 2, 3], [], [None], [5, 6]]}, "'item_id' holds nulls"),
        ({"item_id": [[1, 2, 3], [], None, [5, 6]]}, "'item_id' holds nulls"),
        ({"item_id": [["a", "2", "3"], [], ["4"], ["5", "6"]]}, "does not fit schema.json"),
        ({"item_id": [1, 2, 3, 4]}, "does not fit schema.json"),
        ({"target_from": [1, 1, -1, 1]}, "target_from must be an index >= 0"),
        ({"rating": None}, r"lacks the columns \['rating'\]"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, {name: values for name, values in {**ROWS, **change}.items() if values is not None})
    with pytest.raises(ValueError, match=message):
        EventDataset.from_folder(tmp_path)
    assert not list((tmp_path / ".cache").glob("*.arrow*[!k]")), "no cache of a refused split is left"


def test_missing_splits_and_shards_and_broken_files(tmp_path: Path) -> None:
    write(tmp_path, ROWS, shards=2)
    with pytest.raises(FileNotFoundError, match="no split 'test'; it has train"):
        EventDataset.from_folder(tmp_path, "test")
    shard = tmp_path / "data" / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        EventDataset.from_folder(tmp_path)
    write(tmp_path, ROWS, shards=2)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 shards"):
        EventDataset.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a dataset folder"):
        EventDataset.from_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_one_flipped_bit_in_a_shard_is_found(synthetic_folder: Path, tmp_path: Path, place: float) -> None:
    folder = tmp_path / "data"
    shutil.copytree(synthetic_folder, folder, ignore=shutil.ignore_patterns(".cache"))
    (shard,) = folder.glob("data/train-*")
    column = pq.read_metadata(shard).row_group(0).column(1)
    data = bytearray(shard.read_bytes())
    first = column.data_page_offset + 40  # behind the page's header
    data[first + int(place * (column.total_compressed_size - 60))] ^= 8
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="train-0.*parquet, row group 0, is damaged.*copy the file again"):
        EventDataset.from_folder(folder)


def test_shards_that_differ_from_each_other(tmp_path: Path) -> None:
    write(tmp_path, ROWS, shards=2)
    shard = tmp_path / "data" / "train-00001-of-00002.parquet"
    table = pq.read_table(shard)
    times = table.column_names.index("timestamp")
    drifted = {
        r"lacks the columns \['timestamp'\]": table.drop_columns(["timestamp"]),
        "train-00001.*row group 0, does not fit schema.json: 'timestamp' is list.*double": table.set_column(
            times, "timestamp", pa.array([[float("nan")] * len(x) for x in table["item_id"].to_pylist()])
        ),
        "train-00001.*does not fit": table.set_column(times, "timestamp", pa.array([1] * len(table))),
    }
    for message, changed in drifted.items():
        pq.write_table(changed, shard)
        with pytest.raises(ValueError, match=message):
            EventDataset.from_folder(tmp_path)
    wider = table.append_column("more", pa.array([[0]] * len(table)))
    pq.write_table(wider.select(wider.column_names[::-1]), shard)
    assert EventDataset.from_folder(tmp_path).rows([0, 1, 2, 3])["item_id"].tolist() == sum(ROWS["item_id"], [])


def test_an_empty_shard_adds_no_row(tmp_path: Path) -> None:
    write(tmp_path, ROWS, shards=2)
    shard = tmp_path / "data" / "train-00001-of-00002.parquet"
    pq.write_table(pq.read_table(shard).slice(0, 0), shard)
    assert len(EventDataset.from_folder(tmp_path)) == 2


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(writer, "EVENTS_PER_SHARD", 50)
    monkeypatch.setattr(writer, "EVENTS_PER_ROW_GROUP", 12)
    yield


def test_many_shards_and_row_groups_hold_the_same_rows(tmp_path: Path, small_shards: None) -> None:
    generator = np.random.default_rng(0)
    users, items = generator.integers(0, 40, 600), generator.integers(0, 90, 600)
    log = EventLog(users=pa.array(users), items=pa.array(items), timestamps=np.arange(600))
    prepare_log(log, PrepareConfig(name="x", output_dir=str(tmp_path / "x")))
    assert len(list((tmp_path / "x" / "data").glob("train-*"))) > 5
    dataset = EventDataset.from_folder(tmp_path / "x", "test")
    for row, user in enumerate(dataset.user_ids().to_pylist()):
        assert dataset.rows([row])["item_id"].tolist() == items[users == user].tolist()


def test_load_dataset_reads_the_folder(synthetic_folder: Path, tmp_path: Path) -> None:
    load_dataset = pytest.importorskip("datasets").load_dataset
    folder = tmp_path / "copy"
    shutil.copytree(synthetic_folder, folder)
    ours = EventDataset.from_folder(folder, "test")
    theirs = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert set(theirs) == {"train", "validation", "test"}
    assert theirs["test"].num_rows == len(ours)
    assert theirs["test"][7]["item_id"] == ours.rows([7])["item_id"].tolist()
    assert theirs["test"][7]["target_from"] == ours.target_from[7]
