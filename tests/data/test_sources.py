"""Raw forms of the public data sets, by hand: each gives the same events, each malformed one a clear message."""

import gzip
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grzoo.data import Catalogue, EventDataset
from grzoo.data.prepare import download, prepare

# user, item, rating, time: not in order of time, with a tie (items 20 and 30 of user 2) that keeps the order of the
# file.
EVENTS = [(2, 30, 4, 50), (1, 10, 5, 7), (2, 20, 3, 50), (1, 30, 1, 3), (2, 10, 2, 9)]
HISTORIES = {1: [30, 10], 2: [10, 30, 20]}
TITLES = {10: "Heat (1995)", 20: "Amélie (2001)", 30: "Alien: Romulus, The"}


def movies_dat(folder: Path) -> None:
    lines = [f"{item}::{title}::Crime|Drama" for item, title in TITLES.items()]
    (folder / "movies.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")


def ratings_dat(folder: Path) -> None:
    (folder / "ratings.dat").write_text("".join("::".join(map(str, event)) + "\n" for event in EVENTS))
    movies_dat(folder)


def u_data(folder: Path) -> None:
    (folder / "u.data").write_text("".join("\t".join(map(str, event)) + "\n" for event in EVENTS))
    lines = ["|".join([str(item), title, *["0"] * 22]) for item, title in TITLES.items()]
    (folder / "u.item").write_text("\n".join(lines) + "\n", encoding="latin-1")


def ratings_csv(folder: Path) -> None:
    lines = ["userId,movieId,rating,timestamp", *(f"{u},{i},{r}.0,{t}" for u, i, r, t in EVENTS)]
    (folder / "ratings.csv").write_text("\n".join(lines))
    movies = ["movieId,title,genres", *(f'{item},"{title}",Crime|Drama' for item, title in TITLES.items())]
    (folder / "movies.csv").write_text("\n".join(movies))


def inter(folder: Path) -> None:
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += ["\t".join(map(str, event)) for event in EVENTS]
    (folder / "ml.inter").write_text("\n".join(lines) + "\n")
    items = ["item_id:token\tmovie_title:token_seq\tclass:token_seq"]
    items += [f"{item}\t{title}\tCrime Drama" for item, title in TITLES.items()]
    (folder / "ml.item").write_text("\n".join(items) + "\n")


def user_item_text(folder: Path) -> None:
    lines = [f"{user} {item}" for user, items in HISTORIES.items() for item in items]
    (folder / "ml-1m.txt").write_text("\n".join(lines) + "\n")
    (folder / "sas_to_original_items.txt").write_text("".join(f"{item} {item * 7}\n" for item in TITLES))
    movies = [f"{item * 7}::{title}::Crime|Drama" for item, title in TITLES.items()]
    (folder / "movies.dat").write_text("\n".join(movies) + "\n", encoding="latin-1")


def seq_parquet(folder: Path) -> None:
    user_item_text(folder)
    users, items, ratings, times = zip(*EVENTS, strict=True)
    columns = {"sas_user": users, "sas_item": items, "rating": [4, 5, None, 1, 2], "ts_filled": times}
    pq.write_table(pa.table({**columns, "kind": ["exact"] * 4 + ["filled"]}), folder / "ml-1m_seq_ts.parquet")


MOVIELENS = [ratings_dat, u_data, ratings_csv, inter, user_item_text, seq_parquet]


def histories(folder: Path) -> dict[Any, list[Any]]:
    dataset, catalogue = EventDataset.from_folder(folder, "test"), Catalogue.from_folder(folder)
    users = dataset.user_ids().to_pylist()
    return {user: catalogue.decode(dataset.rows([row])["item_id"]) for row, user in enumerate(users)}


@pytest.mark.parametrize("form", MOVIELENS)
def test_every_form_of_movielens_gives_the_same_events(form: Callable[[Path], None], tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    form(raw)
    report = prepare("ml-1m", tmp_path / "out", raw)
    assert histories(tmp_path / "out") == HISTORIES
    catalogue = Catalogue.from_folder(tmp_path / "out")
    assert catalogue.titles([10, 20, 30]) == list(TITLES.values())
    assert form is u_data or catalogue.table["genres"][0].as_py() == ["Crime", "Drama"]
    dataset = EventDataset.from_folder(tmp_path / "out", "test")
    assert dataset.has_timestamps == (form is not user_item_text)
    if form not in (user_item_text, seq_parquet):
        assert dataset.rows([0, 1])["rating"].tolist() == [1, 5, 2, 4, 3]
    assert report.source.startswith(str(raw)), "the report says which file was taken"


FILES = ["ratings.dat", "u.data", "ratings.csv", "ml.inter", "ml-1m.txt", "ml-1m_seq_ts.parquet"]


@pytest.mark.parametrize(("form", "file"), list(zip(MOVIELENS, FILES, strict=True)))
def test_a_single_file_is_recognised_by_its_name(form: Callable[[Path], None], file: str, tmp_path: Path) -> None:
    form(tmp_path)
    prepare("ml-1m", tmp_path / "out", tmp_path / file)
    assert histories(tmp_path / "out") == HISTORIES


def test_unknown_ratings_are_nan_and_noted(tmp_path: Path) -> None:
    seq_parquet(tmp_path)
    report = prepare("ml-1m", tmp_path / "out", tmp_path)
    ratings = EventDataset.from_folder(tmp_path / "out", "test").rows([0, 1])["rating"]
    assert np.isnan(ratings).sum() == 1
    assert any("80% of the timestamps are true" in line for line in report.lines())


def test_amazon_sequences(tmp_path: Path) -> None:
    (tmp_path / "Beauty.txt").write_text("1 5 6 7\n\n2 6 5\n")
    pq.write_table(
        pa.table({"item_id": [5, 6, 7], "asin": ["A", "B", "C"], "title": ["a", None, "c"]}), tmp_path / "items.parquet"
    )
    prepare("amazon-beauty", tmp_path / "out", tmp_path, validation="last")
    dataset = EventDataset.from_folder(tmp_path / "out", "train")
    assert dataset.rows([0, 1])["item_id"].tolist() == [5, 6, 5] and not dataset.has_timestamps
    assert Catalogue.from_folder(tmp_path / "out").titles([5, 6]) == ["a", "6"]


REVIEWS = [("u1", "B1", 5.0, 20), ("u1", "B2", 4.0, 10), ("u2", "B1", 1.0, 5), ("u2", "B3", 2.0, 6)]


def test_amazon_reviews_and_ratings(tmp_path: Path) -> None:
    names = ("reviewerID", "asin", "overall", "unixReviewTime")
    lines = [
        json.dumps({**dict(zip(names, review, strict=True)), "summary": "fine", "helpful": [0, 0]})
        for review in REVIEWS
    ]
    with gzip.open(tmp_path / "reviews_Books_5.json.gz", "wt") as file:
        file.write("\n".join(lines))
    (tmp_path / "ratings_Toys.csv").write_text("\n".join(",".join(map(str, review)) for review in REVIEWS))
    for category in ("Books", "Toys"):
        prepare("amazon", tmp_path / category, tmp_path, category=category)
        assert histories(tmp_path / category) == {"u1": ["B2", "B1"], "u2": ["B1", "B3"]}
        dataset = EventDataset.from_folder(tmp_path / category, "test")
        assert dataset.rows([0])["rating"].tolist() == [4, 5]


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder", "csv.gz", "jsonl"])
def test_any_event_log(tmp_path: Path, kind: str) -> None:
    columns = {
        "who": ["a", "b", "a", "b"],
        "what": [3, 3, 4, 5],
        "when": [2000, 1500, 1000, 900],
        "click": [True, False, True, False],
    }
    table = pa.table(columns)
    source = tmp_path / f"log.{kind}"
    lines = ["who,what,when,click", *(",".join(map(str, row)).lower() for row in zip(*columns.values(), strict=True))]
    if kind == "csv":
        source.write_text("\n".join(lines))
    elif kind == "csv.gz":
        source.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif kind == "jsonl":
        source.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    elif kind == "parquet":
        pq.write_table(table, source)
    else:
        source.mkdir()
        pq.write_table(table.slice(0, 2), source / "1.parquet")
        pq.write_table(table.slice(2), source / "2.parquet")
    (tmp_path / "items.csv").write_text("sku,label,price\n3,Three,1.5\n5,Five,2.5\n")
    prepare(
        "event_log",
        tmp_path / "out",
        source,
        user_column="who",
        item_column="what",
        timestamp_column="when",
        timestamp_unit="ms",
        feature_columns=["click"],
        item_metadata=str(tmp_path / "items.csv"),
        item_metadata_id="sku",
        title_column="label",
    )
    assert histories(tmp_path / "out") == {"a": [4, 3], "b": [5, 3]}
    rows = EventDataset.from_folder(tmp_path / "out", "test").rows([0, 1])
    assert rows["timestamp"].tolist() == [1, 2, 0, 1] and rows["click"].tolist() == [1, 1, 0, 0]
    catalogue = Catalogue.from_folder(tmp_path / "out")
    assert catalogue.titles([3, 4, 5]) == ["Three", "4", "Five"] and "price" in catalogue.table.column_names


@pytest.mark.parametrize(
    "times",
    [
        pa.array([86400, 1], pa.int32()),
        pa.array([86400.9, 1.0]),
        pa.array([86400_000, 1000], pa.timestamp("ms")),
        pa.array([86400_000_000, 1_000_000], pa.timestamp("us", "Europe/Berlin")),
        pa.array(["1970-01-02 00:00:00", "1970-01-01T00:00:01"]),
    ],
)
def test_times_of_every_type_become_seconds(tmp_path: Path, times: pa.Array) -> None:
    pq.write_table(pa.table({"user_id": [1, 1], "item_id": [7, 8], "t": times}), tmp_path / "log.parquet")
    prepare("event_log", tmp_path / "out", tmp_path / "log.parquet", timestamp_column="t")
    rows = EventDataset.from_folder(tmp_path / "out", "test").rows([0])
    assert rows["timestamp"].tolist() == [1, 86400] and rows["item_id"].tolist() == [8, 7]


BAD_FILES = [
    ("ml-1m", "ratings.dat", "", "is empty"),
    ("ml-1m", "ratings.dat", "1::2::3::4\n1::2::3\n", "line 2"),
    ("ml-1m", "ratings.dat", "1::2::3::4\n1::2::3::4\n1::x::3::4\n", "line 3.*'x'"),
    ("ml-1m", "ratings.csv", "userId,movieId,rating,timestamp\n1,2,3.0,4\n1,2\n", "line 3"),
    (
        "ml-1m",
        "ratings.csv",
        "userId,movieId,stars,timestamp\n1,2,3,4\n",
        "no column 'rating'; it has userId, movieId, stars",
    ),
    ("ml-1m", "ml.inter", "user_id:token\titem_id:token\n1\t2\n", "no column 'timestamp'; it has user_id, item_id"),
    ("ml-1m", "ml-1m.txt", "1 2\n1 3 4\n", "line 2 has 3 fields instead of 2 integers"),
    ("ml-1m", "ml-1m.txt", "1 2\n\n1 b7\n", "line 3 holds 'b7', which is not an integer"),
    ("ml-1m", "x_seq_ts.parquet", "no parquet", "not a readable Parquet file"),
    ("ml-1m", "ratings.dat", "1::2::3::-4\n1::3::3::4\n", "timestamp -4"),
    ("amazon-beauty", "Beauty.txt", "1 2 3\n4\n", "line 2 has 1 fields instead of a user and its items"),
    ("amazon-beauty", "reviews_Beauty_5.json", '{"asin": "B"}\n', "no field 'reviewerID'"),
    ("amazon-beauty", "reviews_Beauty_5.json", '{"asin": "B"}\n{"asin": \n', "malformed.*row 1"),
    ("event_log", "log.csv", "user_id,thing\n1,2\n", "no column 'item_id'; it has user_id, thing; set item_column"),
    ("event_log", "log.csv", "user_id,item_id", "log.csv is empty: it holds no events"),
    ("event_log", "log.csv.gz", "user_id,item_id\n1,2\n", "log.csv.gz is not compressed by gzip"),
    (
        "event_log",
        "log.xlsx",
        "PK\x03\x04",
        "log.xlsx is a ZIP archive or an Excel sheet: unpack it, or save it as CSV",
    ),
    ("event_log", "log.csv", "user_id;item_id\n1;2\n", "no column 'user_id'.*separate the columns by commas"),
    ("event_log", "log.json", '[{"user_id": 1}]', "malformed.*it is one list: write an object a line"),
    ("event_log", "log.csv", "user_id,item_id\n1,\n", "event 1 has no item id"),
    ("event_log", "log.csv", "user_id,item_id\n", "log.csv is empty: it holds no events"),
    ("event_log", "log.csv", "user_id,item_id,price\n1.5,2,3\n", "user ids are of type double"),
]


@pytest.mark.parametrize(("name", "file", "text", "message"), BAD_FILES)
def test_malformed_files(tmp_path: Path, name: str, file: str, text: str, message: str) -> None:
    (tmp_path / file).write_text(text)
    source = tmp_path / file if name == "event_log" else tmp_path
    with pytest.raises(ValueError, match=message) as error:
        prepare(name, tmp_path / "out", source)
    assert file in str(error.value) or "id" in message or "timestamp" in message
    assert not list(tmp_path.glob("out*"))


def test_text_of_another_encoding_names_line_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes("user_id,item_id\n1,a\n2,é\n".encode("latin-1"))
    with pytest.raises(ValueError, match="line 3.*UTF8.*convert the file to UTF-8"):
        prepare("event_log", tmp_path / "out", tmp_path / "log.csv")


def event_log(tmp_path: Path, **options: Any) -> None:
    columns = {"user_id": [1, 1], "item_id": [2, 3], "t": [1.0, float("nan")], "text": ["x", "y"], "bad": ["a", "b"]}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    prepare("event_log", tmp_path / "out", tmp_path / "log.parquet", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestamp_column": "t"}, "event 2 has timestamp nan"),
        ({"timestamp_column": "time"}, "no column 'time'; it has user_id, item_id, t, text, bad; set timestamp_column"),
        ({"timestamp_column": "bad"}, "times are neither numbers nor ISO 8601"),
        ({"feature_columns": ["text"]}, "feature 'text' is of type string"),
        ({"timestamp_unit": "h"}, "timestamp_unit is 'h'; it is one of s, ms, us, ns"),
    ],
)
def test_bad_columns(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        event_log(tmp_path, **options)


def test_missing_sources(tmp_path: Path) -> None:
    for name in ("ml-1m", "amazon-beauty", "event_log"):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            prepare(name, tmp_path / "out", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds none of ratings.dat, .*ml-1m.txt"):
        prepare("ml-1m", tmp_path / "out", tmp_path)
    with pytest.raises(FileNotFoundError, match="holds none of Beauty.txt"):
        prepare("amazon-beauty", tmp_path / "out", tmp_path)
    with pytest.raises(ValueError, match="needs --source"):
        prepare("event_log", tmp_path / "out")
    with pytest.raises(ValueError, match="needs --category"):
        prepare("amazon", tmp_path / "out", tmp_path)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is served as the official site of the downloads, whose cache is empty."""
    root = tmp_path / "site"
    root.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(root))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(download, "GROUPLENS", f"http://127.0.0.1:{httpd.server_port}")
        monkeypatch.setattr(download, "AMAZON", f"http://127.0.0.1:{httpd.server_port}")
        monkeypatch.setenv("GRZOO_CACHE", str(tmp_path / "cache"))
        for variable in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        yield root
        httpd.shutdown()


def archive(root: Path, name: str, form: Callable[[Path], None]) -> str:
    folder = root / name
    folder.mkdir()
    form(folder)
    with zipfile.ZipFile(root / f"{name}.zip", "w") as file:
        for path in folder.iterdir():
            file.write(path, f"{name}/{path.name}")
    return "md5:" + download.pooch.file_hash(str(root / f"{name}.zip"), alg="md5")


def test_downloads_are_checked_and_kept(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(download.CHECKSUMS, "ml-1m", archive(server, "ml-1m", ratings_dat))
    prepare("ml-1m", tmp_path / "out")
    assert histories(tmp_path / "out") == HISTORIES
    (server / "ml-1m.zip").unlink()
    prepare("ml-1m", tmp_path / "again")
    assert histories(tmp_path / "again") == HISTORIES


def test_a_download_that_differs_is_refused(server: Path, tmp_path: Path) -> None:
    archive(server, "ml-1m", ratings_dat)
    with pytest.raises(ValueError, match="does not have its published checksum md5:c4d9eecf"):
        prepare("ml-1m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_download_without_checksum_says_so(server: Path, tmp_path: Path) -> None:
    archive(server, "ml-latest-small", ratings_csv)
    report = prepare("ml-latest-small", tmp_path / "out")
    assert any("has no published checksum" in line for line in report.lines())


def test_an_unreachable_download_names_the_remedy(server: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be downloaded .*pass --source PATH"):
        prepare("amazon-beauty", tmp_path / "out")


@pytest.mark.parametrize("name", ["item_id", "user_id", "timestamp", "target_from"])
def test_a_feature_may_not_take_the_place_of_a_column_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "log.csv").write_text(f"u,i,{name}\n1,2,3\n1,4,5\n")
    options: dict[str, Any] = {"user_column": "u", "item_column": "i", "feature_columns": [name]}
    with pytest.raises(ValueError, match=f"feature_columns names {name}"):
        prepare("event_log", tmp_path / "out", tmp_path / "log.csv", **options)
    assert not (tmp_path / "out").exists()


def test_a_movielens_log_of_another_size_than_its_name_says_is_told(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("1\t2\t3\t4\n1\t3\t3\t5\n2\t2\t5\t6\n")
    report = prepare("ml-100k", tmp_path / "out", tmp_path, split="none")
    assert any("has 3 ratings, ml-100k has 100,000: a part, or another log?" in line for line in report.lines())
