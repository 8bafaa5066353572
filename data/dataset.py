"""Event rows of a split, memory-mapped: lengths at once, events by vectorised gather, no Python lists."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from .arrow_cache import open_cache
from .jagged import Int64, offsets_of, ranges
from .schema import DatasetSchema, FeatureSpec


@dataclass(frozen=True)
class JaggedRows:
    """Events of some rows: `columns[name][offsets[r]:offsets[r + 1]]` are those of the r-th.

    offsets: int64 [rows + 1].  columns: name -> [events], dtype of the feature.
    """

    offsets: Int64
    columns: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]


class EventDataset:
    """The rows of one split: one row per user, its events oldest first.

    `lengths` int32 [rows]: events per row.  `target_from` int32 [rows]: index of the first event of the row that is a
    target. `schema`: the dataset folder's (None for arrays in memory).  `feature_names`: the event columns, `item_id`
    first.

        dataset = EventDataset.from_folder("data/ml-1m", "train")
        rows = dataset.rows([3, 1, 2])
        rows["item_id"][rows.offsets[0] : rows.offsets[1]]  # the events of row 3
    """

    def __init__(
        self,
        columns: Mapping[str, NDArray[Any]],
        starts: Mapping[str, Int64],
        lengths: ArrayLike,
        target_from: ArrayLike,
        schema: DatasetSchema | None = None,
    ) -> None:
        self._columns = dict(columns)
        self._starts = dict(starts)
        self.lengths: NDArray[np.int32] = np.asarray(lengths, dtype=np.int32)
        self.target_from: NDArray[np.int32] = np.asarray(target_from, dtype=np.int32)
        self.schema = schema
        self._reopen: tuple[str, str] | None = None
        self._keep_alive: Any = None

    @classmethod
    def from_folder(cls, path: str | Path, split: str = "train") -> "EventDataset":
        """Open a split of a dataset folder.

        The first call converts its Parquet shards into one uncompressed Arrow file (in the folder's `.cache`, or in
        $GRZOO_CACHE or ~/.cache/grzoo where the folder is read-only); all processes of a machine then share its pages.
        Raises FileNotFoundError for a missing folder or split, ValueError for rows that do not fit the schema.
        """
        schema = DatasetSchema.load(path)
        cache = open_cache(Path(path), split, schema)
        dataset = cls(cache.columns, cache.starts, cache.lengths, cache.target_from, schema)
        dataset._reopen = (str(path), split)
        dataset._keep_alive = cache.owner
        return dataset

    @classmethod
    def from_arrays(
        cls,
        columns: Mapping[str, ArrayLike],
        lengths: ArrayLike,
        target_from: ArrayLike | int = 1,
    ) -> "EventDataset":
        """A split in memory: `columns` name -> flat values [events] of all rows in order, `lengths` [rows]."""
        counts = np.asarray(lengths, dtype=np.int64)
        offsets = offsets_of(counts)
        flat: dict[str, NDArray[Any]] = {name: np.asarray(values) for name, values in columns.items()}
        for name, values in flat.items():
            if len(values) != offsets[-1]:
                raise ValueError(f"column {name!r} holds {len(values)} events, the lengths add up to {offsets[-1]}")
        if "item_id" not in flat:
            raise ValueError(f"event rows need a column item_id, got {sorted(flat)}")
        targets = np.broadcast_to(np.asarray(target_from, dtype=np.int32), counts.shape)
        return cls(flat, dict.fromkeys(flat, offsets[:-1]), counts, targets)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The event columns, `item_id` first."""
        names = [name for name in self._columns if name != "item_id"]
        return ("item_id", *names)

    @property
    def has_timestamps(self) -> bool:
        """Whether events carry a `timestamp` (int64 seconds)."""
        return "timestamp" in self._columns

    @property
    def num_events(self) -> int:
        """Events of all rows."""
        return int(self.lengths.sum(dtype=np.int64))

    def features(self) -> tuple[FeatureSpec, ...]:
        """Name and dtype of every event column."""
        return tuple(FeatureSpec(name=name, dtype=str(self._columns[name].dtype)) for name in self.feature_names)

    def rows(self, indices: ArrayLike, columns: tuple[str, ...] | None = None) -> JaggedRows:
        """All events of the rows `indices` (int [n], any order, repeats allowed)."""
        index = np.asarray(indices, dtype=np.int64)
        return self.gather(index, np.zeros(len(index), dtype=np.int64), self.lengths[index], columns)

    def gather(
        self, indices: ArrayLike, begin: ArrayLike, end: ArrayLike, columns: tuple[str, ...] | None = None
    ) -> JaggedRows:
        """Events begin <= i < end (int [n], within the row) of each of the rows `indices` (int [n])."""
        index = np.asarray(indices, dtype=np.int64)
        first = np.asarray(begin, dtype=np.int64)
        counts = np.asarray(end, dtype=np.int64) - first
        names = self.feature_names if columns is None else columns
        offsets = offsets_of(counts)
        flat: dict[int, Int64] = {}
        values: dict[str, NDArray[Any]] = {}
        for name in names:
            starts, column = self._starts[name], self._columns[name]
            if id(starts) not in flat:
                flat[id(starts)] = ranges(starts[index] + first, counts)
            values[name] = np.empty(offsets[-1], dtype=column.dtype)
            # With mode="raise" numpy takes into a buffer of its own first.
            np.take(column, flat[id(starts)], out=values[name], mode="clip")
        return JaggedRows(offsets, values)

    def events(self, indices: ArrayLike, positions: ArrayLike, column: str = "item_id") -> NDArray[Any]:
        """The value of one event per entry: event `positions[i]` of row `indices[i]`; [n] of the column's dtype."""
        start = self._starts[column][np.asarray(indices, dtype=np.int64)]
        return np.take(self._columns[column], start + np.asarray(positions, dtype=np.int64))

    def user_ids(self) -> pa.ChunkedArray:
        """The original user id of every row (int64 or string), read from the Parquet shards."""
        if self._reopen is None:
            raise ValueError("rows in memory have no original user ids; open a dataset folder with from_folder()")
        from .arrow_cache import read_user_ids

        return read_user_ids(*self._reopen)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._reopen is not None:
            return EventDataset.from_folder, self._reopen
        return EventDataset, (self._columns, self._starts, self.lengths, self.target_from, self.schema)
