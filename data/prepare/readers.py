"""Files of events as Arrow tables, with messages that name the file, the line and the columns that exist."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.json as pjson
import pyarrow.parquet as pq
from grzoo.data.jagged import Int64
from numpy.typing import NDArray

from .config import TIMESTAMP_UNITS

_MISSING = pa.array(pcsv.ConvertOptions().null_values)
_TOO_LATE = 7_258_118_400  # seconds to the year 2200: later times are most likely of another unit


def existing(path: str | Path) -> Path:
    """`path`, or FileNotFoundError."""
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(f"source {found} does not exist: give the path of a file or folder of the raw data")
    return found


def read_delimited(
    path: Path,
    delimiter: str = ",",
    names: Sequence[str] | None = None,
    types: Mapping[str, pa.DataType] | None = None,
    encoding: str = "utf8",
) -> pa.Table:
    """A table of delimited text; `names` None takes them from the first line. A delimiter may have several characters.

    ValueError names the line that has another number of fields or a value of another type.
    """
    data = _content(path)
    if names is None and b"\n" not in data.strip() and b"\r" not in data.strip():
        raise ValueError(f"{path} is empty: it holds no events")
    if len(delimiter) > 1:
        data, delimiter = data.replace(delimiter.encode(), b"\x1f"), "\x1f"
    quotes = delimiter == ","
    try:
        return pcsv.read_csv(
            pa.BufferReader(data),
            # Line numbers in messages need one thread.
            read_options=pcsv.ReadOptions(column_names=names, encoding=encoding, use_threads=False),
            parse_options=pcsv.ParseOptions(
                delimiter=delimiter, quote_char='"' if quotes else False, newlines_in_values=quotes
            ),
            convert_options=pcsv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is malformed: {_line_message(str(error))}") from error


def _line_message(message: str) -> str:
    # Arrow counts the lines of the file from 1 and calls them rows.
    text = message.replace("Row #", "line ").replace("\x1f", "::").split("\n")[0]
    return f"{text}: convert the file to UTF-8" if "UTF8" in text else text


def _content(path: Path) -> bytes:
    data = existing(path).read_bytes()
    if not data.strip():
        raise ValueError(f"{path} is empty: it holds no events")
    if path.suffix == ".gz":
        try:
            data = pa.CompressedInputStream(pa.BufferReader(data), "gzip").read()
        except OSError as error:
            raise ValueError(f"{path} is not compressed by gzip, or damaged ({error}): pack or name it anew") from error
    if data.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} is a ZIP archive or an Excel sheet: unpack it, or save it as CSV")
    return data


def read_table(path: Path, ids: Sequence[str] = ()) -> pa.Table:
    """A CSV (.csv, .tsv, .txt, also .gz), JSON lines (.json, .jsonl) or Parquet file, or a folder of Parquet files.

    ids: columns of ids, which delimited text gives as `ids_of_text` says.
    """
    existing(path)
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise FileNotFoundError(f"{path} holds no Parquet file; give a CSV or Parquet file")
        return pa.concat_tables([read_table(file) for file in files])
    name = path.name.removesuffix(".gz")
    if name.endswith((".parquet", ".pq")):
        try:
            return pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    if name.endswith((".json", ".jsonl")):
        return read_json_lines(path)
    table = read_delimited(path, "\t" if name.endswith(".tsv") else ",", types=dict.fromkeys(ids, pa.string()))
    for at, column_name in enumerate(table.column_names):
        if column_name in ids:
            table = table.set_column(at, column_name, ids_of_text(table.column(at)))
    return table


def ids_of_text(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids of delimited text: int64 where every one is written as an integer is, else text.

    Hence 007 and 7 stay two ids, as do integers beyond 64 bits; numbers with a decimal point are float64. Missing
    numbers are null.
    """
    trimmed = pc.utf8_trim_whitespace(values)
    missing = pc.is_in(trimmed, value_set=_MISSING)
    trimmed = pc.if_else(missing, pa.scalar(None, pa.string()), trimmed)
    try:
        numbers = trimmed.cast(pa.int64())
        # Arrow also takes 007 and 0x7 for integers.
        as_written = pc.all(pc.equal(numbers.cast(pa.string()), trimmed)).as_py()
        return values if as_written is False else numbers
    except pa.ArrowInvalid:
        only_digits = pc.all(pc.match_substring_regex(trimmed, "^-?[0-9]*$")).as_py()
    try:
        return values if only_digits else trimmed.cast(pa.float64())
    except pa.ArrowInvalid:
        return values


def read_json_lines(path: Path, types: Mapping[str, pa.DataType] | None = None) -> pa.Table:
    """A table of JSON objects, one a line; with `types` only these fields are read."""
    schema = pa.schema(list(types.items())) if types else None
    behaviour = "ignore" if types else "infer"
    try:
        return pjson.read_json(
            pa.BufferReader(_content(path)),
            read_options=pjson.ReadOptions(use_threads=False, block_size=16 << 20),
            parse_options=pjson.ParseOptions(explicit_schema=schema, unexpected_field_behavior=behaviour),
        )
    except pa.ArrowInvalid as error:
        hint = "" if types or _content(path).lstrip()[:1] != b"[" else "; it is one list: write an object a line"
        raise ValueError(f"{path} is malformed: {error}{hint}") from error


def read_integer_lines(path: Path, fields: int | None = None) -> tuple[Int64, Int64]:
    """Whitespace-separated integers by line: their values, flat int64, and their number in each line, int64 [lines].

    fields: the number that every line must have; None allows any from 2 on. Blank lines are not counted.
    """
    text = pa.array([_content(path).decode("utf-8", errors="replace")])
    lines = pc.list_flatten(pc.split_pattern(text, "\n"))
    trimmed = pc.utf8_trim_whitespace(lines)
    filled = np.flatnonzero(pc.not_equal(trimmed, "").to_numpy(zero_copy_only=False))
    words = pc.utf8_split_whitespace(trimmed.take(pa.array(filled)))
    counts = words.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    wrong = np.flatnonzero(counts != fields if fields else counts < 2)
    if len(wrong):
        at = int(wrong[0])
        wanted = f"{fields} integers" if fields else "a user and its items"
        raise ValueError(f"{path} is malformed: line {filled[at] + 1} has {counts[at]} fields instead of {wanted}")
    flat = pc.list_flatten(words)
    try:
        return flat.cast(pa.int64()).to_numpy(), counts
    except pa.ArrowInvalid:
        bad = pc.index(pc.match_substring_regex(flat, r"^[+-]?[0-9]{1,18}$"), False).as_py()
        line = filled[int(np.searchsorted(np.cumsum(counts), bad, side="right"))] + 1
        raise ValueError(
            f"{path} is malformed: line {line} holds {flat[bad].as_py()!r}, which is not an integer"
        ) from None


def column(table: pa.Table, name: str, path: Path, option: str | None = None) -> pa.ChunkedArray:
    """A column of a table read from `path`; ValueError names the columns that exist."""
    if name not in table.column_names:
        hint = f"; set {option} to one of them" if option else ""
        if len(table.column_names) == 1 and any(mark in table.column_names[0] for mark in ";\t|"):
            hint = "; separate the columns by commas (in a file .tsv by tabs)"
        raise ValueError(f"{path} has no column {name!r}; it has {', '.join(table.column_names)}{hint}")
    if table.column_names.count(name) > 1:
        raise ValueError(f"{path} has several columns {name!r}: rename all but one")
    return table.column(name)


def seconds(values: pa.ChunkedArray, unit: str, path: Path, first: int = 0) -> Int64:
    """Times as int64 seconds since 1970, from numbers in `unit`, timestamps, dates, or text in ISO 8601.

    first: number of events before these, for the message about a bad one.
    """
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type) or pa.types.is_date(values.type):
        try:
            values = values.cast(pa.timestamp("us"))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: times are neither numbers nor ISO 8601 ({error})") from error
    if pa.types.is_timestamp(values.type):
        if unit != "s":
            warnings.warn(f"timestamp_unit {unit} has no effect: {path} has times of a known unit", stacklevel=2)
        values, unit = values.cast(pa.timestamp(values.type.unit)).cast(pa.int64()), values.type.unit
    numbers = values.to_numpy() if not values.null_count else values.cast(pa.float64()).to_numpy()
    if numbers.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            at = first + int(bad[0]) + 1
            raise ValueError(f"{path}: event {at} has timestamp {numbers[bad[0]]}: drop or repair such events")
    if numbers.dtype.kind not in "iuf":
        raise ValueError(f"{path}: times are of type {values.type}; give seconds since 1970")
    found = np.floor_divide(numbers, TIMESTAMP_UNITS[unit]).astype(np.int64)
    if unit == "s" and len(found) and int(found.max()) >= _TOO_LATE:
        raise ValueError(
            f"{path}: timestamp {int(found.max())} is after the year 2200, in seconds: set "
            "timestamp_unit to ms, us or ns"
        )
    return found


def numbers(values: pa.ChunkedArray, name: str, path: Path) -> NDArray[Any]:
    """A numeric feature: integers stay, others become float32 (nulls NaN)."""
    kind = values.type
    if pa.types.is_boolean(kind):
        return values.cast(pa.int8()).to_numpy()
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(f"{path}: feature {name!r} is of type {kind}; features are numbers, encode it first")
    if pa.types.is_integer(kind) and not values.null_count:
        return values.cast(pa.int64()).to_numpy()
    return values.cast(pa.float64()).to_numpy().astype(np.float32)


def genres(values: pa.ChunkedArray, separator: str) -> pa.ChunkedArray:
    """Lists of genres from text such as "Action|Comedy"."""
    return pc.split_pattern(values.cast(pa.string()), separator)
