"""Group by user of a log larger than memory, by DuckDB's external sort; the folder is that of the log read whole.

Beside the dataset folder lies `NAME.preparing` while it is made:
    parts/      the log in Parquet files of a few million events, checked and typed
    users, items   original ids with their events, in the order of the catalogue
    columns/    events sorted by user and time: a flat file per column, which the writer maps into memory
    folder/     the dataset folder, renamed when it is complete
A call that was killed goes on with the first part, event or shard that is missing. Memory does not grow with the
events, but with users (about 120 bytes each, more for ids that are text) and items.
"""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from grzoo.data.jagged import Int64, offsets_of
from tqdm import tqdm

from . import event_log
from .config import PrepareConfig
from .log import GroupedLog, id_notes, model_ids_of
from .splits import check_split
from .stream import event_files, feature_columns, raw_batches, typed, whole_feature

_LAYOUT_VERSION = 2
PART_EVENTS = 4_000_000
_SORTED_BATCH = 1 << 18
_PROCESS_GB = 0.35  # of the memory: what the process, Arrow and the writer take; DuckDB has the rest


class OutOfCore:
    """The preparation of one event log in the folder `work`, which survives a kill.

    Raises ValueError when `work` belongs to another log or other options.
    """

    def __init__(self, config: PrepareConfig) -> None:
        for option in ("k_core", "ranking"):
            if getattr(config, option):
                raise ValueError(f"{option} needs the whole log in memory: leave it or max_memory_gb away")
        # What can be told now is not left to be found after hours.
        event_log.check_features(config)
        event_log.about(config)
        check_split(config, config.timestamp_column is not None)
        _duckdb()
        self.config = config
        self.features = feature_columns(config)
        self.files = event_files(config)
        target = Path(config.output_dir)
        self.work = target.with_name(f"{target.name}.preparing")
        self.folder = self.work / "folder"
        self._claim()

    def group(self) -> GroupedLog:
        """The log grouped by user, its events in mapped files."""
        self._split_into_parts()
        keys = {name: self._keys(name) for name in ("user", "item")}
        mapping, model_ids = model_ids_of(keys["item"]["key"], self.config.id_mapping)
        offsets = offsets_of(keys["user"]["events"])
        codes, columns = self._sort(offsets, model_ids)
        about = event_log.about(self.config)
        user_ids, item_ids = keys["user"]["key"], keys["item"]["key"]
        about["notes"] += id_notes(user_ids.chunk(0), item_ids.chunk(0))
        return GroupedLog(user_ids, offsets, codes, item_ids, model_ids, mapping, columns, **about)

    def discard(self) -> None:
        """Remove the folder of work."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _claim(self) -> None:
        """Make `work`, or find it as a killed call with the same log and options has left it."""
        options = {k: v for k, v in asdict(self.config).items() if k not in ("overwrite", "max_memory_gb")}
        files = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in self.files]
        identity = hashlib.sha256(json.dumps([_LAYOUT_VERSION, options, files], sort_keys=True).encode()).hexdigest()
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / "identity"
        if path.is_file() and path.read_text() != identity:
            raise ValueError(
                f"{self.work} holds the unfinished preparation of another log or with other options: repeat that "
                "call, or delete the folder"
            )
        _write_text(path, identity)

    def _parts(self) -> list[Path]:
        return sorted((self.work / "parts").glob("[0-9]*.parquet"))

    def _split_into_parts(self) -> None:
        """Write `parts/`; those that exist are complete."""
        done, folder = self.work / "parts.done", self.work / "parts"
        if done.exists():
            return
        folder.mkdir(exist_ok=True)
        names = [self.config.user_column, self.config.item_column, *self.config.feature_columns]
        names += [self.config.timestamp_column] if self.config.timestamp_column else []
        parts = self._parts()
        begun = sum(pq.read_metadata(part).num_rows for part in parts)
        schema = pq.read_schema(parts[0]) if parts else None
        held: list[pa.Table] = []
        ids = (self.config.user_column, self.config.item_column)
        with _progress("read", begun, None) as bar:
            for batch in raw_batches(self.files, list(dict.fromkeys(names)), ids, begun):
                table = typed(batch, self.config, Path(self.config.source or ""))
                schema = schema or table.schema
                _check_drift(schema, table.schema, batch.path, self.features)
                held.append(table)
                bar.update(len(batch))
                if sum(map(len, held)) >= PART_EVENTS:
                    _write(pa.concat_tables(held), folder / f"{len(parts):05d}.parquet")
                    parts.append(folder)
                    held = []
            if held:
                _write(pa.concat_tables(held), folder / f"{len(parts):05d}.parquet")
        if not self._parts():
            raise ValueError(f"{self.config.source} is empty: it holds no events")
        done.touch()

    def _keys(self, name: str) -> pa.Table:
        """Columns `key` (original ids: ascending integers, or text in order of appearance) and `events`, in one chunk.

        Their rows are the codes of the ids.
        """
        path = self.work / f"{name}s.parquet"
        if not path.is_file():
            text = pa.types.is_string(pq.read_schema(self._parts()[0]).field(name).type)
            order = "first" if text else "key"
            grouped = f"SELECT {name} AS key, count(*) AS events, min(row) AS first FROM parts GROUP BY {name}"
            ordered = f"SELECT *, row_number() OVER (ORDER BY {order}) - 1 AS code FROM ({grouped}) ORDER BY {order}"
            with _progress(f"{name}s", 0, 1), self._database() as database:
                database.execute(f"COPY ({ordered}) TO '{_sql(path)}.tmp' (FORMAT parquet)")
            os.replace(f"{path}.tmp", path)
        keys = pq.read_table(path).combine_chunks()
        assert np.array_equal(keys["code"].to_numpy(), np.arange(len(keys)))
        return keys

    @contextmanager
    def _database(self) -> Iterator[Any]:
        """A DuckDB connection with the view `parts`, and `users` and `items` where they are made."""
        duckdb = _duckdb()
        assert self.config.max_memory_gb is not None
        spill = self.work / "spill"
        settings = {
            "memory_limit": f"{int((self.config.max_memory_gb - _PROCESS_GB) * 1000)}MB",
            "temp_directory": str(spill),
            "preserve_insertion_order": False,
        }
        folder = glob.escape(str(self.work))
        sources = {"parts": f"{folder}/parts/[0-9]*.parquet"}
        sources |= {name: f"{folder}/{name}.parquet" for name in ("users", "items")}
        try:
            with duckdb.connect(config=settings) as database:
                for name, path in sources.items():
                    if name == "parts" or (self.work / f"{name}.parquet").is_file():
                        # A folder NAME=VALUE above the files is no column of theirs.
                        files = f"read_parquet('{_sql(path)}', hive_partitioning=false)"
                        database.execute(f"CREATE VIEW {name} AS SELECT * FROM {files}")
                yield database
        except duckdb.Error as error:
            raise OSError(
                f"{error}; raise max_memory_gb or make room on the disk of {self.work}, then repeat the call: it goes "
                "on where it was"
            ) from error

    def _sort(self, offsets: Int64, model_ids: Int64) -> tuple[Int64, dict[str, np.memmap[Any, Any]]]:
        """The item code of each of the sorted events, and their columns by name, mapped into memory."""
        schema = pq.read_schema(self._parts()[0])
        dtypes: dict[str, Any] = {"item_code": np.int64, "item_id": np.int64}
        dtypes |= {"timestamp": np.int64} if self.config.timestamp_column else {}
        nulls = self._features_with_nulls(schema)
        for own in self.features.values():
            dtypes[own] = np.float32 if nulls[own] else schema.field(own).type.to_pandas_dtype()
        folder, done = self.work / "columns", self.work / "sorted"
        folder.mkdir(exist_ok=True)
        begun = int(done.read_text()) if done.is_file() else 0
        columns = {name: _mapped(folder / name, dtype, int(offsets[-1]), begun > 0) for name, dtype in dtypes.items()}
        at = begun
        with _progress("sort", begun, int(offsets[-1])) as bar:
            for batch in self._sorted_batches(int(np.searchsorted(offsets, begun))) if begun < offsets[-1] else ():
                here = slice(at, at + len(batch))
                codes = batch.column("code").to_numpy()
                columns["item_code"][here] = codes
                columns["item_id"][here] = model_ids[codes]
                if "timestamp" in columns:
                    columns["timestamp"][here] = batch.column("timestamp").to_numpy()
                for own in self.features.values():
                    columns[own][here] = whole_feature(batch.column(own), nulls[own])
                at += len(batch)
                bar.update(len(batch))
                # Whole users only, so that the rest can be sorted alone.
                sure = int(offsets[np.searchsorted(offsets, at, side="right") - 1])
                if sure - begun >= PART_EVENTS or at == offsets[-1]:
                    for values in columns.values():
                        values.flush()
                    _write_text(done, str(sure))
                    begun = sure
        codes = columns.pop("item_code")
        names = {own: name for name, own in self.features.items()}
        return codes, {names.get(own, own): values for own, values in columns.items()}

    def _sorted_batches(self, first_user: int) -> Iterator[pa.RecordBatch]:
        """Events of the users from code `first_user` on: `code` of the item, `timestamp`, features."""
        wanted = [*self.features.values()]
        order = ["u.code", "p.row"]
        if self.config.timestamp_column:
            wanted.append("timestamp")
            order.insert(1, "p.timestamp")
        names = "".join(f', p."{name}"' for name in wanted)
        with self._database() as database:
            query = database.sql(
                f"SELECT i.code{names} FROM parts p JOIN users u ON p.user = u.key JOIN items i ON p.item = i.key "
                f"WHERE u.code >= {first_user} ORDER BY {', '.join(order)}"
            )
            yield from query.to_arrow_reader(_SORTED_BATCH)

    def _features_with_nulls(self, schema: pa.Schema) -> dict[str, bool]:
        """Which columns of integer features have no value somewhere."""
        found = {}
        for own in self.features.values():
            at = schema.get_field_index(own)
            integers = pa.types.is_integer(schema.field(own).type)
            found[own] = integers and any(_null_count(part, at) for part in self._parts())
        return found


def _null_count(part: Path, column: int) -> int:
    metadata = pq.read_metadata(part)
    return sum(metadata.row_group(k).column(column).statistics.null_count for k in range(metadata.num_row_groups))


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError as error:
        raise ValueError("max_memory_gb needs DuckDB: pip install '.[scale]'") from error
    return duckdb


def _check_drift(expected: pa.Schema, found: pa.Schema, path: Path, features: dict[str, str]) -> None:
    names = {own: name for name, own in features.items()}
    for field in expected:
        other = found.field(field.name).type
        if other != field.type:
            name = names.get(field.name, field.name)
            raise ValueError(
                f"{path}: {name} is of type {other}, in the files before it {field.type}: bring all to one type"
            )


def _write(table: pa.Table, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _mapped(path: Path, dtype: Any, events: int, continued: bool) -> np.memmap[Any, Any]:
    if not continued:
        _allocate(path, events * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype=dtype, mode="r+", shape=(events,))


def _allocate(path: Path, size: int) -> None:
    """Make a file that has its place on the disk: one with holes kills its writer (SIGBUS) when the disk is full."""
    with path.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise OSError(
                f"{path} of {size:,} bytes has no place ({error.strerror}): make room on that disk, then repeat the "
                "call: it goes on where it was"
            ) from error


def _sql(text: Any) -> str:
    """Text inside quotes of an SQL statement."""
    return str(text).replace("'", "''")


def _progress(what: str, begun: int, total: int | None) -> Any:
    # tqdm's None: hidden where there is no terminal.
    return tqdm(desc=what, initial=begun, total=total, unit=" events", unit_scale=True, disable=None)
