"""The events of a new day into a dataset folder: rows that are complete again, and a catalogue that has grown.

    prepare("event_log", "folder", source="until_monday.parquet", timestamp_column="time", split="none")
    day = append_day("folder", log_of_tuesday)             # "day_00001"
    EventDataset.from_folder("folder", day)                # evaluate on it, then train on it

A row of a day is an active user's whole past and then the new events; `target_from` is the first new one, so that what
came before is context only. The last row of a user is therefore complete: later days read it and nothing else.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from grzoo.data.catalogue import Catalogue
from grzoo.data.dataset import EventDataset, JaggedRows
from grzoo.data.jagged import Int64, offsets_of, ranges
from grzoo.data.schema import ITEMS_FILE, SCHEMA_FILE, DatasetSchema
from numpy.typing import NDArray

from .log import EventLog, GroupedLog, group
from .splits import SplitRows
from .writer import write_shard

_DAYS = b"grzoo.days"  # in items.parquet: how many days its counts hold


def days(folder: str | Path) -> list[str]:
    """The splits of the days that were appended to a dataset folder, oldest first."""
    return list(DatasetSchema.load(folder).split.get("days", []))


class HistoryStore:
    """The complete history of every user of a dataset folder: the last row that any of `train` and the days has."""

    def __init__(self, folder: str | Path) -> None:
        # Latest first, because a search finds the first of several equal ids.
        self._splits = [EventDataset.from_folder(folder, name) for name in ("train", *days(folder))][::-1]
        self._firsts = offsets_of([len(split) for split in self._splits])
        chunks = [chunk for split in self._splits for chunk in split.user_ids().chunks]
        self._users = pa.concat_arrays(chunks)

    def past(self, user_ids: pa.Array) -> JaggedRows:
        """All events of each user so far, oldest first; none for a user who is new."""
        found = pc.index_in(user_ids, value_set=self._users)
        place = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        which = np.searchsorted(self._firsts, place, side="right") - 1
        lengths = np.zeros(len(place), dtype=np.int64)
        for number, split in enumerate(self._splits):
            mine = which == number
            lengths[mine] = split.lengths[place[mine] - self._firsts[number]]
        offsets = offsets_of(lengths)
        columns = {f.name: np.empty(offsets[-1], dtype=f.dtype) for f in self._splits[0].features()}
        for number, split in enumerate(self._splits):
            mine = np.flatnonzero(which == number)
            rows = split.rows(place[mine] - self._firsts[number])
            target = ranges(offsets[:-1][mine], lengths[mine])
            for name, values in columns.items():
                values[target] = rows[name]
        return JaggedRows(offsets, columns)


def append_day(folder: str | Path, log: EventLog) -> str:
    """Append the events of a day (or any later period) as a split of its own and return its name.

    The new shard is written first, then the catalogue, then `schema.json`, by which the day exists: a call that was
    killed is repeated as it was. Raises ValueError when the log has other columns than the folder, or an event that is
    older than the last one of its user.
    """
    root, schema = Path(folder), DatasetSchema.load(folder)
    appended = list(schema.split.get("days", []))
    name = f"day_{len(appended) + 1:05d}"
    _check_columns(schema, log)
    grouped = group(log, "vocabulary")
    catalogue = Catalogue.from_folder(root)
    if catalogue.original_ids.type != grouped.item_ids.type:
        kinds = f"{grouped.item_ids.type}, those of the catalogue are {catalogue.original_ids.type}"
        raise ValueError(f"item ids of the new events are {kinds}: bring both to one type")
    table, model_ids = _grown(catalogue, grouped, pq.read_schema(root / ITEMS_FILE).metadata or {}, len(appended) + 1)
    grouped = replace(grouped, columns={**grouped.columns, "item_id": model_ids[grouped.item_codes]})
    joined, past = _join(HistoryStore(root), grouped, schema)
    rows = SplitRows(np.arange(len(past)), joined.lengths, np.maximum(past, 1))
    _write_atomically(root / "data" / f"{name}-00000-of-00001.parquet", lambda path: write_shard(path, joined, rows))
    _write_atomically(root / ITEMS_FILE, lambda path: pq.write_table(table, path, compression="zstd"))
    _extend_card(root / "README.md", name)
    split = {**schema.split, "days": [*appended, name]}
    text = root / f"{SCHEMA_FILE}.{uuid4().hex[:8]}"
    text.mkdir()
    replace(schema, split=split).save(text)
    os.replace(text / SCHEMA_FILE, root / SCHEMA_FILE)
    text.rmdir()
    return name


def _check_columns(schema: DatasetSchema, log: EventLog) -> None:
    own = {"item_id", *log.features} | ({"timestamp"} if log.timestamps is not None else set())
    if own != set(schema.feature_names):
        raise ValueError(
            f"the new events have the columns {sorted(own)}, the folder has {sorted(schema.feature_names)}: "
            "read them with the same feature_columns and timestamp_column"
        )


def _grown(catalogue: Catalogue, day: GroupedLog, metadata: Mapping[bytes, bytes], number: int) -> tuple[Any, Int64]:
    """The catalogue's table after the day `number`, and the model id of each of the day's items."""
    ids, known = catalogue.encode(day.item_ids.to_pylist())
    if catalogue.id_mapping == "vocabulary":
        ids[~known] = int(catalogue.ids.max(initial=0)) + 1 + np.arange(int((~known).sum()))
    if int(metadata.get(_DAYS, b"0")) >= number:
        return catalogue.table, ids  # written by a call that was killed after it
    events = np.bincount(day.item_codes, minlength=len(ids))
    counts = catalogue.counts
    np.add.at(counts, catalogue.index_of(ids[known]), events[known])
    at = catalogue.table.column_names.index("count")
    table = catalogue.table.set_column(at, "count", pa.array(counts))
    new = pa.array(~known)
    more = {"item_id": day.item_ids.filter(new), "id": pa.array(ids[~known]), "count": pa.array(events[~known])}
    details = day.item_metadata
    if details is not None:
        index = pc.index_in(more["item_id"], value_set=details.column("item_id").combine_chunks())
        more |= {key: details.column(key).take(index) for key in table.column_names if key in details.column_names[1:]}
    table = pa.concat_tables([table, pa.table(more)], promote_options="permissive")
    Catalogue(table, catalogue.id_mapping)  # refuses two items with one id
    return table.replace_schema_metadata({_DAYS: str(number).encode()}), ids


def _join(store: HistoryStore, day: GroupedLog, schema: DatasetSchema) -> tuple[GroupedLog, Int64]:
    """The day's users with their past before the new events, and how many events of each are past, int64 [users]."""
    past = store.past(day.user_ids)
    before, new = np.diff(past.offsets), day.lengths
    offsets = offsets_of(before + new)
    old_at, new_at = ranges(offsets[:-1], before), ranges(offsets[:-1] + before, new)
    columns: dict[str, NDArray[Any]] = {}
    for feature in schema.features:
        values = np.empty(offsets[-1], dtype=feature.dtype)
        values[old_at], values[new_at] = past[feature.name], day.columns[feature.name]
        columns[feature.name] = values
    if "timestamp" in columns:
        _check_times(columns["timestamp"], offsets, before, day.user_ids)
    return replace(day, offsets=offsets, columns=columns), before


def _check_times(times: NDArray[Any], offsets: Int64, before: Int64, user_ids: pa.Array) -> None:
    known = np.flatnonzero(before > 0)
    first = offsets[:-1][known] + before[known]
    late = np.flatnonzero(times[first] < times[first - 1])
    if len(late):
        user, at = user_ids[int(known[late[0]])].as_py(), int(first[late[0]])
        raise ValueError(
            f"user {user} has a new event at {times[at]}, before the last one at {times[at - 1]}: days are appended "
            "in order of time; drop late events, or prepare the whole log again"
        )


def _write_atomically(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _extend_card(path: Path, name: str) -> None:
    """Name the split in the card's front matter, where `datasets.load_dataset` looks for it."""
    entry = f"  - split: {name}\n    path: data/{name}-*.parquet\n"
    if path.is_file() and entry not in (text := path.read_text(encoding="utf-8")):
        path.write_text(text.replace("\ntags:\n", f"\n{entry}tags:\n", 1), encoding="utf-8")
