"""Amazon reviews (2014) in their raw forms.

CATEGORY.txt                  "user item item ..." a line, chronological, 5-core; with items.parquet for titles
reviews_CATEGORY_5.json(.gz)  one review a line: reviewerID, asin, overall, unixReviewTime, 5-core
ratings_CATEGORY.csv          user,item,rating,timestamp without a header, all ratings: use k_core 5
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import download
from .config import PrepareConfig
from .log import EventLog
from .readers import column, existing, numbers, read_delimited, read_integer_lines, read_json_lines, seconds

OPTIONS = frozenset({"source"})
CATEGORIES = {"amazon-beauty": "Beauty", "amazon-sports": "Sports_and_Outdoors"}

_Reader = Callable[[Path], EventLog]


def read(config: PrepareConfig) -> EventLog:
    """The log of a category, from `source` (a file, or a folder in which the form is found) or downloaded (5-core)."""
    category = CATEGORIES.get(config.name, config.category)
    if not category:
        raise ValueError("amazon needs --category, as in the file names: Beauty, Books, Toys_and_Games, ...")
    if config.source is None:
        log = _reviews(download.amazon(category))
        log.notes += ("Amazon publishes no checksums: the download is unchecked",)
        return log
    path, reader = _find(existing(config.source), category)
    return reader(path)


def _find(source: Path, category: str) -> tuple[Path, _Reader]:
    forms: tuple[tuple[str, _Reader], ...] = (
        (f"{category}.txt", _sequences),
        (f"reviews_{category}_5.json*", _reviews),
        (f"{category}_5.json*", _reviews),
        (f"ratings_{category}.csv", _ratings),
    )
    if source.is_dir():
        for pattern, reader in forms:
            found = sorted(source.glob(pattern))
            if found:
                return found[0], reader
        wanted = ", ".join(pattern for pattern, _ in forms)
        raise FileNotFoundError(f"{source} holds none of {wanted}: give the folder or file of the raw data")
    name = source.name.removesuffix(".gz")
    if name.endswith((".json", ".jsonl")):
        return source, _reviews
    return source, _ratings if name.endswith(".csv") else _sequences


def _sequences(path: Path) -> EventLog:
    values, counts = read_integer_lines(path)
    heads = np.cumsum(counts) - counts
    keep = np.ones(len(values), dtype=bool)
    keep[heads] = False
    return EventLog(
        users=pa.array(np.repeat(values[heads], counts - 1)),
        items=pa.array(values[keep]),
        item_metadata=_items(path.with_name("items.parquet")),
        source=str(path),
        notes=("the file has no timestamps: its order is the time",),
    )


def _items(path: Path) -> pa.Table | None:
    if not path.is_file():
        return None
    table = pq.read_table(path)
    known = [name for name in ("item_id", "asin", "title", "categories") if name in table.column_names]
    column(table, "item_id", path)
    table = table.select(known)
    if "title" not in known and "asin" in known:
        table = table.append_column("title", table["asin"])
    return table


def _reviews(path: Path) -> EventLog:
    types = {
        "reviewerID": pa.string(),
        "asin": pa.string(),
        "overall": pa.float32(),
        "unixReviewTime": pa.int64(),
    }
    table = read_json_lines(path, types)
    for name in ("reviewerID", "asin", "unixReviewTime"):
        if table[name].null_count == len(table):
            raise ValueError(f"{path} has no field {name!r}: it is not a file of reviews")
    return _log(table.rename_columns(["user", "item", "rating", "timestamp"]), path)


def _ratings(path: Path) -> EventLog:
    types = {"user": pa.string(), "item": pa.string(), "rating": pa.float32(), "timestamp": pa.int64()}
    return _log(read_delimited(path, ",", list(types), types), path)


def _log(table: pa.Table, path: Path) -> EventLog:
    return EventLog(
        users=table["user"],
        items=table["item"],
        timestamps=seconds(table["timestamp"], "s", path),
        features={"rating": numbers(table["rating"], "rating", path)},
        source=str(path),
    )
