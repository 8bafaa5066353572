"""Writes a dataset folder: complete under a temporary name, then renamed, so that a partial one is never found."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from grzoo.data.jagged import Int64, cut_rows, offsets_of, ranges
from grzoo.data.schema import ITEMS_FILE, SCHEMA_FILE, DatasetSchema, FeatureSpec
from numpy.typing import NDArray

from .config import PrepareConfig
from .histogram import PLOT_FILE
from .log import GroupedLog
from .splits import Split, SplitRows

_OWN_NAMES = {"data", ITEMS_FILE, SCHEMA_FILE, "README.md", PLOT_FILE, "walk.json"}  # of a dataset folder

EVENTS_PER_SHARD = 20_000_000
EVENTS_PER_ROW_GROUP = 1_000_000


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends, and is removed when the block fails.

    ValueError when `path` exists and is not empty, unless `overwrite` is set and it holds a dataset.
    """
    target = Path(path)
    check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(target: Path, overwrite: bool) -> None:
    """ValueError unless a dataset folder may be made at `target`."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; choose a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(f"{target} exists and is not empty: choose another folder, or overwrite it (--overwrite)")
        if not (target / SCHEMA_FILE).is_file():
            raise ValueError(f"{target} is not a dataset folder: it is not overwritten, choose another one")
        if foreign := sorted(
            e.name for e in target.iterdir() if e.name not in _OWN_NAMES and not e.name.startswith(".")
        ):
            raise ValueError(f"{target} holds {', '.join(foreign)}, not written by preparation: it is not overwritten")


def replace_folder(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`, in place of what is there."""
    old = target.with_name(f"{target.name}.old-{uuid4().hex[:8]}")
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)


def schema_of(grouped: GroupedLog, config: PrepareConfig, split: Split, statistics: Mapping[str, Any]) -> DatasetSchema:
    """The schema of a grouped log."""
    options = config.shaping()
    if config.item_metadata is not None:
        options["item_metadata"] = short_source(config.item_metadata)
    return DatasetSchema(
        name=config.name,
        options=options,
        features=tuple(FeatureSpec(name=key, dtype=str(values.dtype)) for key, values in grouped.columns.items()),
        id_mapping=grouped.id_mapping,
        user_id_dtype="int64" if pa.types.is_integer(grouped.user_ids.type) else "string",
        split=dict(split.arguments),
        statistics=dict(statistics),
        source=short_source(grouped.source),
        ranking=dict(grouped.ranking),
    )


def short_source(source: str) -> str:
    """`source` without the folders of this machine: of a path its last two parts."""
    return "/".join(Path(source).parts[-2:]) if Path(source).exists() else source


def write_splits(folder: Path, grouped: GroupedLog, split: Split) -> None:
    """Write `data/<split>-00000-of-0000N.parquet` for every split; those that a killed call has left are kept."""
    (folder / "data").mkdir(exist_ok=True)
    for name, rows in split.rows.items():
        shards = cut_rows(rows.length, EVENTS_PER_SHARD)
        for number, (first, last) in enumerate(shards):
            path = folder / "data" / f"{name}-{number:05d}-of-{len(shards):05d}.parquet"
            if not path.exists():
                temporary = path.with_name(f".{path.name}")
                write_shard(temporary, grouped, SplitRows(*(values[first:last] for values in _columns(rows))))
                os.replace(temporary, path)


def _columns(rows: SplitRows) -> tuple[Int64, Int64, Int64]:
    return rows.user, rows.length, rows.target_from


def write_shard(path: Path, grouped: GroupedLog, rows: SplitRows) -> None:
    """Write the rows of a split as one Parquet file."""
    writer: pq.ParquetWriter | None = None
    try:
        for first, last in cut_rows(rows.length, EVENTS_PER_ROW_GROUP):
            table = _table(grouped, SplitRows(*(values[first:last] for values in _columns(rows))))
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True)
            writer.write_table(table, row_group_size=max(1, len(table)))
    finally:
        if writer is not None:
            writer.close()


def _table(grouped: GroupedLog, rows: SplitRows) -> pa.Table:
    events = ranges(grouped.offsets[:-1][rows.user], rows.length)
    offsets = pa.array(offsets_of(rows.length).astype(np.int32))
    columns: dict[str, pa.Array] = {"user_id": grouped.user_ids.take(pa.array(rows.user))}
    for name, values in grouped.columns.items():
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values[events]))
    columns["target_from"] = pa.array(rows.target_from.astype(np.int32))
    return pa.table(columns)


def train_counts(grouped: GroupedLog, split: Split) -> NDArray[np.int64]:
    """Events of each item in the train split, int64 [items]."""
    rows = split.rows["train"]
    counts = np.zeros(len(grouped.item_ids), dtype=np.int64)
    for first, last in cut_rows(rows.length, EVENTS_PER_ROW_GROUP):
        events = ranges(grouped.offsets[:-1][rows.user[first:last]], rows.length[first:last])
        counts += np.bincount(grouped.item_codes[events], minlength=len(counts))
    return counts


def metadata_rows(grouped: GroupedLog) -> pa.Array:
    """The row of each item in the item metadata, null where it has none; ids of two types are compared as text."""
    assert grouped.item_metadata is not None
    ids, wanted = grouped.item_ids, grouped.item_metadata.column("item_id").combine_chunks()
    if not pa.types.is_integer(ids.type) or not pa.types.is_integer(wanted.type):
        ids, wanted = ids.cast(pa.string()), wanted.cast(pa.string())
    return pc.index_in(ids, value_set=wanted.cast(ids.type))


def write_items(folder: Path, grouped: GroupedLog, counts: NDArray[np.int64]) -> None:
    """Write `items.parquet`: every item of the log, joined with what its metadata says."""
    table = pa.table({"item_id": grouped.item_ids, "id": pa.array(grouped.model_ids), "count": pa.array(counts)})
    metadata = grouped.item_metadata
    if metadata is not None:
        index = metadata_rows(grouped)
        for name in metadata.column_names:
            if name not in table.column_names:
                table = table.append_column(name, metadata.column(name).take(index))
    pq.write_table(table, folder / ITEMS_FILE, compression="zstd")
