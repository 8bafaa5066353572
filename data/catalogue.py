"""The catalogue of a dataset folder, `items.parquet`: every item, its two ids, its count and what is known of it."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import ArrayLike, NDArray

from .jagged import Int64
from .negatives import AllItems, ItemLogQ, SharedNegatives, UniformNegatives
from .schema import ID_MAPPINGS, ITEMS_FILE, DatasetSchema

OriginalId = int | str


def hash_ids(names: pa.Array) -> Int64:
    """xxh3_64 of the UTF-8 text of each name, as signed integers, int64 [n]."""
    digest = xxhash.xxh3_64_intdigest
    values = np.fromiter((digest(name.encode()) for name in names.to_pylist()), dtype=np.uint64, count=len(names))
    return values.view(np.int64)


class Catalogue:
    """Items of a data set.

    table: columns `item_id` (original id, int64 or string, unique), `id` (int64 model id, unique), `count` (events in
    the train split, int64) and any others, such as `title` and `genres`.  id_mapping: how the model id came from the
    original one.
    """

    def __init__(self, table: pa.Table, id_mapping: str) -> None:
        missing = [name for name in ("item_id", "id", "count") if name not in table.column_names]
        if missing:
            raise ValueError(f"the catalogue lacks the columns {missing}; it has {table.column_names}")
        if id_mapping not in ID_MAPPINGS:
            raise ValueError(f"id_mapping is {id_mapping!r}; it is one of {', '.join(ID_MAPPINGS)}")
        self.table = table.combine_chunks()
        self.id_mapping = id_mapping
        self.ids: Int64 = _column(self.table, "id").to_numpy(zero_copy_only=False).astype(np.int64)
        self._order = np.argsort(self.ids, kind="stable")
        self._sorted = self.ids[self._order]
        if len(self.ids) and (np.diff(self._sorted) == 0).any():
            raise ValueError("model ids repeat in the catalogue: two original ids share one; prepare the data again")

    @classmethod
    def from_folder(cls, folder: str | Path, id_mapping: str | None = None) -> "Catalogue":
        """The catalogue of a dataset folder, or of a saved processor's; FileNotFoundError when there is none."""
        path = Path(folder) / ITEMS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {folder} holds no catalogue; make one with prepare_data")
        return cls(pq.read_table(path), id_mapping or DatasetSchema.load(folder).id_mapping)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def original_ids(self) -> pa.Array:
        """The ids of the source, int64 or string [n]."""
        return _column(self.table, "item_id")

    @property
    def counts(self) -> Int64:
        """Events of each item in the train split, int64 [n]."""
        return _column(self.table, "count").to_numpy(zero_copy_only=False).astype(np.int64)

    @cached_property
    def log_q(self) -> ItemLogQ:
        """log(count / total) by model id."""
        return ItemLogQ(self.ids, self.counts)

    def all_items(self) -> AllItems:
        """Every item as a negative of every position: the full softmax."""
        return AllItems(self.ids)

    def uniform_negatives(self, num_negatives: int) -> UniformNegatives:
        """Negatives per position, uniform over the catalogue."""
        return UniformNegatives(self.ids, num_negatives)

    def shared_negatives(self, num_negatives: int) -> SharedNegatives:
        """Negatives shared by a step, drawn from its labels."""
        return SharedNegatives(self.ids, self.counts, num_negatives)

    def index_of(self, ids: ArrayLike) -> Int64:
        """Row in the catalogue of each model id, -1 where unknown; int64, shape of `ids`."""
        wanted = np.asarray(ids, dtype=np.int64)
        if not len(self.ids):
            return np.full(wanted.shape, -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self._sorted, wanted), len(self.ids) - 1)
        return np.where(self._sorted[at] == wanted, self._order[at], -1)

    def encode(self, original_ids: Sequence[OriginalId]) -> tuple[Int64, NDArray[np.bool_]]:
        """Model ids int64 [n] of original ids, and a mask [n] of those that are known.

        An unknown id of a hashed catalogue gets its hash, an unknown integer of an "identity" catalogue itself; both
        are valid ids of a dynamic table. An unknown id of a vocabulary gets 0 and has no meaning. ValueError when an
        id has the wrong type.
        """
        wanted = _as_array(original_ids, self.original_ids.type)
        at = pc.index_in(wanted, value_set=self.original_ids)
        known = pc.is_valid(at).to_numpy(zero_copy_only=False)
        index = pc.fill_null(at, 0).to_numpy(zero_copy_only=False)
        ids = self.ids[index] if len(self.ids) else np.zeros(len(wanted), dtype=np.int64)
        if not known.all():
            ids[~known] = self._encode_unknown(wanted.filter(pa.array(~known)))
        return ids, known

    def _encode_unknown(self, names: pa.Array) -> Int64 | int:
        if self.id_mapping == "hash":
            return hash_ids(names)
        return names.to_numpy() if self.id_mapping == "identity" else 0

    def decode(self, ids: ArrayLike) -> list[OriginalId | None]:
        """Original ids of model ids (any shape, flattened); None where unknown."""
        return self._values("item_id", ids)

    def titles(self, ids: ArrayLike) -> list[str]:
        """A name for each model id (any shape, flattened): its title, else its original id, else "unknown item N"."""
        flat = np.asarray(ids, dtype=np.int64).ravel()
        titles = self._values("title", flat) if "title" in self.table.column_names else [None] * len(flat)
        names: Iterable[tuple[int, Any, Any]] = zip(flat.tolist(), titles, self.decode(flat), strict=True)
        return [str(title or (name if name is not None else f"unknown item {item}")) for item, title, name in names]

    def _values(self, column: str, ids: ArrayLike) -> list[Any]:
        index = self.index_of(np.asarray(ids, dtype=np.int64).ravel())
        taken = _column(self.table, column).take(pa.array(index, mask=index < 0))
        return taken.to_pylist()

    def save(self, folder: str | Path) -> Path:
        """Write `items.parquet` into `folder`."""
        path = Path(folder) / ITEMS_FILE
        pq.write_table(self.table, path)
        return path


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def _as_array(values: Sequence[OriginalId], dtype: pa.DataType) -> pa.Array:
    integer = pa.types.is_integer(dtype)
    wrong = [
        value for value in values if isinstance(value, bool) or not isinstance(value, Integral if integer else str)
    ]
    if wrong:
        kind = "integers" if integer else "text"
        raise ValueError(f"item id {wrong[0]!r} does not fit: the original ids of this catalogue are {kind}")
    try:
        return pa.array(values, type=dtype)
    except (OverflowError, pa.ArrowInvalid):
        large = next(value for value in values if not -(2**63) <= int(value) < 2**63)
        raise ValueError(f"item id {large} does not fit into 64 bits") from None
