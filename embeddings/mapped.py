"""Read-only tables in the files themselves: opened in no time, lookups read the pages that they touch and no others."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from .hashing import bucket
from .index import read_index
from .kernels import STEP_SLOT, Slot, TableStorage
from .loading import check_columns, check_metadata, read_offsets, saved_names
from .shards import IDS, OFFSETS
from .shared_rows import SHARED_FILE, load_shared
from .tensor_file import MappedTensor, TensorFile

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection

_READ_AHEAD_FROM = 8  # of so many rows of a file one is asked for: then all of them are read in order


def map_tables(collection: "DynamicEmbeddingCollection", folder: str | os.PathLike[str]) -> None:
    """Replace the rows of all tables by those of a folder, mapped into memory and read-only. For one process.

    Args:
        collection: tables with the configs that were saved, without an optimizer, on one rank.
        folder: written by `save_tables` on any number of ranks; its files must stay as they are.

    Raises:
        ValueError: the folder does not fit or is damaged (headers and lengths are checked, ids and rows are not read),
            the tables are sharded, or they have an optimizer.
    """
    if collection.exchange.world_size > 1 or collection.optimizer is not None:
        raise ValueError("mapped tables are for reading in one process: use load_tables for ranks and for training")
    metadata = read_index(folder)["metadata"]
    names = saved_names(collection, metadata)
    check_metadata(collection, metadata, False, names)
    fresh = [table.empty_like() for table in collection.physical]
    for position, table in enumerate(fresh):
        storage = MappedStorage(table.dim, str(folder), table.rounding)
        for logical, config in enumerate(table.configs):
            assert collection.places[config.name] == (position, logical)
            for shard in metadata["shards"]:
                storage.add(_map_shard(Path(folder) / shard["file"], config.name, logical, shard, table.dim))
        table.use_storage(storage)
    if metadata.get("shared_rows"):
        load_shared(collection, fresh, Path(folder) / SHARED_FILE, names, state=False)
    collection.replace_physical(fresh)


class _Segment:
    """The rows of one logical table in one file, sorted by (bucket, id)."""

    def __init__(
        self, logical: int, buckets: tuple[int, int], ids: MappedTensor, rows: MappedTensor, offsets: Tensor
    ) -> None:
        self.logical, self.buckets = logical, buckets
        self.ids, self.rows = ids.values, rows  # int64 [n], float32 or bfloat16 [n, dim]
        self.offsets = offsets  # int64 [buckets + 1]
        self.start = 0  # handle of its first row

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: Tensor, buckets: Tensor) -> Tensor:
        """Return rows int64 [n] of ids of these buckets, -1 where absent: a binary search within the bucket."""
        low, end = self.offsets[buckets - self.buckets[0]], self.offsets[buckets - self.buckets[0] + 1]
        found, high = torch.full_like(low, -1), end.clone()
        active = (low < high).nonzero().flatten()
        while len(active):
            middle = (low[active] + high[active]) // 2
            values, wanted = self.ids[middle], ids[active]
            hit = values == wanted
            found[active[hit]] = middle[hit]
            low[active] = torch.where(values < wanted, middle + 1, low[active])
            high[active] = torch.where(values > wanted, middle, high[active])
            active = active[~hit]
            active = active[low[active] < high[active]]
        return found

    def gather(self, places: Tensor) -> Tensor:
        """Return rows float32 [n, dim]."""
        if len(places) * _READ_AHEAD_FROM > len(self):
            self.rows.read_ahead()
        return self.rows.values[places].float()


def _map_shard(path: Path, name: str, logical: int, shard: Mapping[str, object], dim: int) -> _Segment:
    buckets, rows = shard["buckets"], shard["rows"]
    assert isinstance(buckets, list) and isinstance(rows, dict)
    with TensorFile(path) as file:
        where = f"table {name!r} in {path}"
        check_columns(where, file, name, {IDS: (torch.int64, 0), "rows": (torch.float32, dim)}, rows[name])
        if f"{name}.{OFFSETS}" not in file.tensors:
            raise ValueError(f"{where} has no {OFFSETS}: load it with trainable=True and save it again")
        offsets = read_offsets(file, name, buckets)
        return _Segment(logical, (buckets[0], buckets[1]), file.map(f"{name}.ids"), file.map(f"{name}.rows"), offsets)


class MappedStorage(TableStorage):
    """A `TableStorage` over files. A handle is the number of a row when the files are laid end to end.

    Args:
        dim: width of a row.
        folder: named in errors.
        rounding: None, or rows are bfloat16: those of the files are rounded to the nearest, as loading does.
    """

    def __init__(self, dim: int, folder: str, rounding: str | None = None) -> None:
        self._dim, self._folder, self._rounding = dim, folder, rounding
        self._segments: list[_Segment] | None = []
        self._size = 0

    def add(self, segment: _Segment) -> None:
        """Append the rows of one logical table in one file."""
        segment.start = self._size
        self._open.append(segment)
        self._size += len(segment)

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def _open(self) -> list[_Segment]:
        if self._segments is None:
            raise RuntimeError("this embedding table was closed")
        return self._segments

    def find(self, tables: Tensor, ids: Tensor) -> Tensor:
        handles = torch.full(ids.shape, -1, dtype=torch.int64, device="cpu")
        buckets = bucket(ids)
        for segment in self._open:
            first, end = segment.buckets
            mine = ((tables == segment.logical) & (buckets >= first) & (buckets < end)).nonzero().flatten()
            if len(mine):
                found = segment.find(ids[mine], buckets[mine])
                handles[mine] = torch.where(found < 0, found, found + segment.start)
        return handles

    def gather(self, handles: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(len(handles), self._dim, dtype=torch.float32, device="cpu")
        out[handles < 0] = 0
        for segment in self._open:
            mine = ((handles >= segment.start) & (handles < segment.start + len(segment))).nonzero().flatten()
            if len(mine):
                rows = segment.gather(handles[mine] - segment.start)
                out[mine] = rows if self._rounding is None else rows.bfloat16().float()
        return out

    def gather_slot(self, name: str, handles: Tensor, out: Tensor | None = None) -> Tensor:
        dtype = torch.int32 if name == STEP_SLOT else torch.float32
        values = torch.zeros(len(handles), 1, dtype=dtype, device="cpu")  # as in rows without state
        return values if out is None else out.copy_(values)

    def sorted_keys(self, table: int) -> tuple[Tensor, Tensor]:
        mine = [segment for segment in self._open if segment.logical == table]
        ids = [segment.ids for segment in mine]
        handles = [torch.arange(s.start, s.start + len(s), dtype=torch.int64, device="cpu") for s in mine]
        return torch.cat(ids), torch.cat(handles)

    def keys(self) -> tuple[Tensor, Tensor, Tensor]:
        segments = self._open
        lengths = torch.tensor([len(segment) for segment in segments], dtype=torch.int64, device="cpu")
        logical = torch.tensor([segment.logical for segment in segments], dtype=torch.int32, device="cpu")
        handles = torch.arange(self._size, dtype=torch.int64, device="cpu")
        return logical.repeat_interleave(lengths), torch.cat([segment.ids for segment in segments]), handles

    def __len__(self) -> int:
        return self._size if self._open is not None else 0

    def memory_bytes(self) -> int:
        """Bytes of the offsets; what is mapped belongs to the page cache."""
        return sum(segment.offsets.nbytes for segment in self._open)

    def close(self) -> None:
        self._segments = None

    def set_slots(self, slots: Sequence[Slot]) -> None:
        self._refuse()

    def find_or_insert(self, tables: Tensor, ids: Tensor) -> tuple[Tensor, int]:
        self._refuse()

    def scatter(self, handles: Tensor, rows: Tensor | None, slots: Mapping[str, Tensor]) -> None:
        self._refuse()

    def erase(self, tables: Tensor, ids: Tensor) -> int:
        self._refuse()

    def update(self, rule: str, handles: Tensor, grads: Tensor, keys: Tensor | None = None, **hyper: float) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"these tables are mapped from {self._folder} and read-only: to train, insert or change rows load them by "
            "from_pretrained(..., trainable=True), on many ranks with process_group=..."
        )
