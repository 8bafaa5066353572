"""The memory-mapped form of a split: its Parquet shards as one uncompressed Arrow file, keyed by size, time and footer.

Beside it lies a second one, `.rows`, with a line per row: its length, its `target_from` and where its events start.
Both are mapped, so that what a process holds in memory of its own does not grow with the data.

Every buffer of the file lies in one mapping, so an event of a row has one index into a flat view of the mapping,
whatever record batch holds it: a batch of random rows is one `numpy.take`, and all processes of a machine share the
page cache.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from .jagged import Int64
from .schema import DatasetSchema, FeatureSpec

TARGET_COLUMN = "target_from"
USER_COLUMN = "user_id"
_FOOTER_BYTES = 1 << 16
_LAYOUT_VERSION = "3"


@dataclass(frozen=True)
class CachedSplit:
    """Views of one mapping: columns name -> flat view, starts name -> first event of every row in it (int64 [rows])."""

    columns: dict[str, NDArray[Any]]
    starts: dict[str, Int64]
    lengths: NDArray[np.int32]
    target_from: NDArray[np.int32]
    owner: pa.Buffer


def split_files(folder: Path, split: str) -> list[Path]:
    """The Parquet shards of a split, in order; FileNotFoundError naming the splits that exist."""
    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    if not files:
        splits = sorted(
            {path.name.rsplit("-of-", 1)[0].rsplit("-", 1)[0] for path in folder.glob("data/*-of-*.parquet")}
        )
        raise FileNotFoundError(f"{folder} has no split {split!r}; it has {', '.join(splits) or 'no data'}")
    expected = int(files[0].stem.rsplit("-of-", 1)[-1])
    if len(files) != expected:
        raise FileNotFoundError(
            f"{folder} has {len(files)} of {expected} shards of split {split!r}: copy the missing ones"
        )
    return files


def read_user_ids(folder: str, split: str) -> pa.ChunkedArray:
    """The column user_id of a split."""
    return pa.concat_tables([pq.read_table(path, columns=[USER_COLUMN]) for path in split_files(Path(folder), split)])[
        0
    ]


def open_cache(folder: Path, split: str, schema: DatasetSchema) -> CachedSplit:
    """The split's views; builds the Arrow file on first use (one builder per machine, atomically)."""
    files = split_files(folder, split)
    name = f"{split}-{_content_key(files, schema)}.arrow"
    for cache in _cache_folders(folder):
        if (cache / name).is_file():
            return _map(cache / name, schema)
    cache = _writable_cache(folder)
    with _lock(cache / f"{name}.lock"):
        if not (cache / name).is_file():
            _build(files, schema, cache / name)
            if cache.parent == folder:
                _drop_others(cache, split, name)
    return _map(cache / name, schema)


def _drop_others(cache: Path, split: str, name: str) -> None:
    """Remove the Arrow files of earlier contents of the split; who has them mapped keeps them."""
    for old in cache.glob(f"{split}-*.arrow*"):
        if not old.name.startswith(name):
            old.unlink(missing_ok=True)


def _content_key(files: list[Path], schema: DatasetSchema) -> str:
    digest = xxhash.xxh3_128(f"{_LAYOUT_VERSION}{schema.features}".encode())
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}:".encode())
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _FOOTER_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def _cache_folders(folder: Path) -> list[Path]:
    home = os.environ.get("GRZOO_CACHE") or Path.home() / ".cache" / "grzoo"
    return [folder / ".cache", Path(home)]


def _writable_cache(folder: Path) -> Path:
    for cache in _cache_folders(folder):
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(cache, os.W_OK):
            return cache
    raise ValueError(f"neither {folder} nor ~/.cache/grzoo can be written; set GRZOO_CACHE to a folder that can")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One builder at a time where the file system has locks; elsewhere several build and the last rename wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def _build(files: list[Path], schema: DatasetSchema, target: Path) -> None:
    """Stream the shards, row group by row group, into an Arrow file beside `target`, then rename it."""
    temporary = target.with_name(f"{target.name}.tmp-{uuid4().hex[:8]}")
    arrow_schema = _arrow_schema(schema)
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, arrow_schema) as writer:
            for path in files:
                for batch in _checked_batches(path, schema, arrow_schema):
                    writer.write_batch(batch)
        _write_rows(_row_index(temporary, schema), _rows_file(temporary))
        # The events last: where their file is found, that of the rows is complete.
        os.replace(_rows_file(temporary), _rows_file(target))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        _rows_file(temporary).unlink(missing_ok=True)


def _rows_file(events: Path) -> Path:
    return events.with_name(f"{events.name}.rows")


def _write_rows(rows: pa.RecordBatch, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_batch(rows)


def _arrow_schema(schema: DatasetSchema) -> pa.Schema:
    fields = [pa.field(feature.name, pa.list_(_arrow_type(feature))) for feature in schema.features]
    return pa.schema([*fields, pa.field(TARGET_COLUMN, pa.int32())])


def _arrow_type(feature: FeatureSpec) -> pa.DataType:
    # Arrow packs bool into bits; a byte per event keeps the flat view addressable.
    return pa.int8() if feature.dtype == "bool" else pa.from_numpy_dtype(np.dtype(feature.dtype))


def _checked_batches(path: Path, schema: DatasetSchema, arrow_schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file ({error}); prepare the data again") from error
    missing = [name for name in arrow_schema.names if name not in file.schema_arrow.names]
    if missing:
        raise ValueError(f"{path} lacks the columns {missing} of schema.json; it has {file.schema_arrow.names}")
    first_row = 0
    for group in range(file.num_row_groups):
        try:
            table = file.read_row_group(group, columns=arrow_schema.names)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}, row group {group}, is damaged ({error}): copy the file again") from error
        columns = [_cast(table[field.name], field, path, group) for field in arrow_schema]
        for batch in pa.table(columns, schema=arrow_schema).combine_chunks().to_batches():
            _check_rows(batch, schema, path, first_row)
            yield batch
            first_row += batch.num_rows


def _cast(column: pa.ChunkedArray, field: pa.Field, path: Path, group: int) -> pa.ChunkedArray:
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{path}, row group {group}, does not fit schema.json: {field.name!r} is {column.type} there and "
            f"{field.type} in the schema ({error}); prepare the data again"
        ) from error


def _check_rows(batch: pa.RecordBatch, schema: DatasetSchema, path: Path, first_row: int) -> None:
    lengths = batch.column(0).value_lengths().to_numpy(zero_copy_only=False)
    for feature in schema.features:
        column = batch.column(feature.name)
        if column.null_count or column.values.null_count:
            raise ValueError(f"{path}: column {feature.name!r} holds nulls; fill or drop those events")
        uneven = np.flatnonzero(column.value_lengths().to_numpy(zero_copy_only=False) != lengths)
        if len(uneven):
            raise ValueError(f"{path}, row {first_row + uneven[0]}: {feature.name!r} and item_id have unequal lengths")
    if schema.has_timestamps:
        times = pc.list_flatten(batch.column("timestamp")).to_numpy(zero_copy_only=False)
        if len(times) and times.min() < 0:
            at = int(times.argmin())
            row = first_row + int(np.searchsorted(np.cumsum(lengths), at, side="right"))
            raise ValueError(
                f"{path}, row {row}: negative timestamp {times[at]}; timestamps are seconds since 1970: repair or "
                "drop that event"
            )
        # The first event of a row may be earlier than the last one of the row before it.
        ends = np.cumsum(lengths)
        falls = np.setdiff1d(np.flatnonzero(times[1:] < times[:-1]) + 1, ends)
        if len(falls):
            row = first_row + int(np.searchsorted(ends, falls[0], side="right"))
            raise ValueError(f"{path}, row {row}: timestamps fall: sort each history by time")
    targets = batch.column(TARGET_COLUMN).to_numpy(zero_copy_only=False)
    if batch.column(TARGET_COLUMN).null_count or (targets < 0).any():
        raise ValueError(f"{path}: target_from must be an index >= 0 in every row")


def _row_index(events: Path, schema: DatasetSchema) -> pa.RecordBatch:
    """Length, `target_from` and first event of each column of every row of an Arrow file of events."""
    whole = pa.memory_map(str(events), "r").read_buffer()
    reader = pa.ipc.open_file(pa.BufferReader(whole))
    batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    empty = np.zeros(0, dtype=np.int32)
    lengths = [batch.column(0).value_lengths().to_numpy(zero_copy_only=False) for batch in batches]
    targets = [batch.column(TARGET_COLUMN).to_numpy(zero_copy_only=False) for batch in batches]
    columns = {"length": np.concatenate([empty, *lengths]), TARGET_COLUMN: np.concatenate([empty, *targets])}
    for feature in schema.features:
        columns[_start_of(feature)] = _starts(batches, feature.name, whole.address, _dtype(feature).itemsize)
    return pa.RecordBatch.from_pydict({name: pa.array(values) for name, values in columns.items()})


def _start_of(feature: FeatureSpec) -> str:
    return f"start of {feature.name}"


def _dtype(feature: FeatureSpec) -> np.dtype[Any]:
    return np.dtype("int8" if feature.dtype == "bool" else feature.dtype)


def _map(path: Path, schema: DatasetSchema) -> CachedSplit:
    whole = pa.memory_map(str(path), "r").read_buffer()
    index = pa.ipc.open_file(pa.memory_map(str(_rows_file(path)), "r")).get_batch(0)
    rows = {name: index.column(name).to_numpy() for name in index.schema.names}
    columns: dict[str, NDArray[Any]] = {}
    for feature in schema.features:
        dtype = _dtype(feature)
        columns[feature.name] = np.frombuffer(whole, dtype=dtype, count=whole.size // dtype.itemsize)
    starts = {feature.name: rows[_start_of(feature)] for feature in schema.features}
    return CachedSplit(columns, starts, rows["length"], rows[TARGET_COLUMN], whole)


def _starts(batches: list[pa.RecordBatch], name: str, base: int, itemsize: int) -> Int64:
    starts = [np.zeros(0, dtype=np.int64)]
    for batch in batches:
        column = batch.column(name)
        values = column.values.buffers()[1]
        first = 0 if values is None else (values.address - base) // itemsize
        starts.append(first + column.offsets.to_numpy()[:-1].astype(np.int64))
    return np.concatenate(starts)
