"""A log of events from its files a batch at a time, checked and typed as when it is read whole."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .config import PrepareConfig
from .log import check_times, plain_ids
from .readers import column, existing, ids_of_text, numbers, seconds

BATCH = 1 << 18
_CSV_BLOCK = 16 << 20
_BUFFER = 1 << 20


@dataclass
class Batch:
    """Events number `first` to `first + len` of a log, in the order of its files."""

    first: int
    table: pa.Table
    path: Path

    def __len__(self) -> int:
        return len(self.table)


def event_files(config: PrepareConfig) -> list[Path]:
    """The files of an event log; FileNotFoundError where there is none, ValueError for a form that is read whole."""
    if config.source is None:
        raise ValueError("event_log needs --source PATH, a CSV or Parquet file of events")
    path = existing(config.source)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} holds no Parquet file; give a CSV or Parquet file")
    whole = [file for file in files if not _is_parquet(file) and not _is_delimited(file)]
    if whole:
        raise ValueError(f"{whole[0]} cannot be read in parts: leave max_memory_gb away, or convert it to Parquet")
    return files


def raw_batches(files: list[Path], columns: list[str], ids: Sequence[str], skip: int = 0) -> Iterator[Batch]:
    """The columns of the files from event `skip` on, which must be where a batch of an earlier call began.

    ids: which of the columns are ids.
    """
    first = 0
    for file in files:
        tables = _parquet(file, columns, skip - first) if _is_parquet(file) else _delimited(file, columns, ids)
        for rows, table in tables:
            if first >= skip and table is not None and rows:
                yield Batch(first, table, file)
            first += rows


def typed(batch: Batch, config: PrepareConfig, source: Path) -> pa.Table:
    """Columns user, item, timestamp (int64 seconds, where there are times), the features, and row, the event's number.

    Integer features may hold nulls, others are float32. Raises ValueError as the log that is read whole would.
    """
    table, first = batch.table, batch.first
    found: dict[str, Any] = {
        "user": plain_ids(column(table, config.user_column, batch.path, "user_column"), "user", first),
        "item": plain_ids(column(table, config.item_column, batch.path, "item_column"), "item", first),
    }
    if config.timestamp_column:
        values = column(table, config.timestamp_column, batch.path, "timestamp_column")
        times = seconds(values, config.timestamp_unit, batch.path, first)
        check_times(times, str(source), first)
        found["timestamp"] = pa.array(times)
    for name, own in feature_columns(config).items():
        values = column(table, name, batch.path, "feature_columns")
        if pa.types.is_integer(values.type):
            found[own] = values.cast(pa.int64())
        else:
            found[own] = pa.array(numbers(values, name, batch.path))
    found["row"] = pa.array(np.arange(first, first + len(table)))
    return pa.table(found)


def feature_columns(config: PrepareConfig) -> dict[str, str]:
    """Feature -> its column of `typed`: numbered, as a feature may have any name."""
    return {name: f"feature {number}" for number, name in enumerate(dict.fromkeys(config.feature_columns))}


def whole_feature(values: pa.Array, has_nulls: bool) -> NDArray[Any]:
    """A feature as `readers.numbers` returns it of the whole log: integers, or float32 where any of them is missing."""
    if pa.types.is_integer(values.type) and has_nulls:
        return values.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float32)
    return values.to_numpy(zero_copy_only=False)


def _check_columns(present: list[str], wanted: list[str], path: Path) -> None:
    for name in wanted:
        if name not in present:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(present)}")


def _is_parquet(path: Path) -> bool:
    return path.suffix in (".parquet", ".pq")


def _is_delimited(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".csv", ".tsv", ".txt"))


def _parquet(path: Path, columns: list[str], skip: int) -> Iterator[tuple[int, pa.Table | None]]:
    """Rows and table of each batch; row groups that lie wholly before event `skip` of the file are not decoded."""
    try:
        # Buffered, or a column chunk is read whole, however large its row group.
        file = pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
        _check_columns(file.schema_arrow.names, columns, path)
        begun = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            begun += rows
            if begun <= skip:
                yield rows, None
                continue
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns):
                yield len(batch), pa.Table.from_batches([batch])
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


def _delimited(path: Path, columns: list[str], ids: Sequence[str]) -> Iterator[tuple[int, pa.Table | None]]:
    try:
        with _open_csv(path, [], ids) as reader:
            _check_columns(reader.schema.names, columns, path)
        kinds: dict[str, pa.DataType] = {}
        # Columns that nobody asked for may hold anything.
        with _open_csv(path, columns, ids) as reader:
            for batch in reader:
                table = pa.Table.from_batches([batch])
                for name in ids:
                    values = ids_of_text(table.column(name))
                    kind = kinds.setdefault(name, values.type)
                    if pa.types.is_string(kind) and values.type != kind:
                        values = table.column(name)
                    if values.type != kind and values.null_count < len(values):
                        raise pa.ArrowInvalid(f"column {name!r} is of type {kind} first, {values.type} later")
                    table = table.set_column(table.column_names.index(name), name, values)
                yield len(batch), table
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is malformed: {error} (columns have the types of their first {_CSV_BLOCK >> 20} MiB; where later "
            "values are of another one, convert the file to Parquet)"
        ) from error


@contextmanager
def _open_csv(path: Path, columns: list[str], ids: Sequence[str]) -> Iterator[pcsv.CSVStreamingReader]:
    """A reader of these columns of delimited text, of all if none is named; `ids` as text."""
    delimiter = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
    quotes = delimiter == ","
    with pa.input_stream(str(path), compression="detect") as stream:
        yield pcsv.open_csv(
            stream,
            read_options=pcsv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK),
            parse_options=pcsv.ParseOptions(
                delimiter=delimiter, quote_char='"' if quotes else False, newlines_in_values=quotes
            ),
            convert_options=pcsv.ConvertOptions(
                strings_can_be_null=False, include_columns=columns, column_types=dict.fromkeys(ids, pa.string())
            ),
        )
