"""How the rows of all tables are cut into files: by ranges of buckets, whatever the number of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .exchange import Exchange
from .hashing import NUM_BUCKETS, bucket, bucket_range
from .kernels import STEP_SLOT
from .table import PhysicalTable

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection


@dataclass(frozen=True)
class Shard:
    """One file: the rows of all tables whose buckets are in [first, end)."""

    file: str
    first: int
    end: int


def plan_shards(bytes_per_bucket: Tensor, max_bytes: int) -> list[Shard]:
    """Cut the buckets, int64 [NUM_BUCKETS] bytes each, into the fewest ranges of at most max_bytes (or one bucket)."""
    end_bytes = torch.cumsum(bytes_per_bucket, 0)
    cuts = [0]
    while cuts[-1] < NUM_BUCKETS:
        done = int(end_bytes[cuts[-1] - 1]) if cuts[-1] else 0
        fits = int(torch.searchsorted(end_bytes, done + max_bytes, right=True))
        cuts.append(max(fits, cuts[-1] + 1))
    n = len(cuts) - 1
    return [Shard(f"embeddings-{i + 1:05d}-of-{n:05d}.safetensors", cuts[i], cuts[i + 1]) for i in range(n)]


class LocalRows:
    """The rows of one logical table on this rank in file order, and how many there are in each bucket on all ranks."""

    def __init__(self, collection: "DynamicEmbeddingCollection", name: str, *, state: bool) -> None:
        position, logical = collection.placement[name]
        self.name = name
        self.table: PhysicalTable = collection.physical[position]
        self.state = state
        self._ids, self._handles = self.table.sorted_keys(logical)
        local = torch.bincount(bucket(self._ids), minlength=NUM_BUCKETS)
        self._starts = _offsets(local)
        self.rows_per_bucket = collection.exchange.sum_tensor(local)  # int64 [NUM_BUCKETS]

    def layout(self) -> dict[str, tuple[torch.dtype, int]]:
        """Tensors of a row, in the order in which they travel: name -> dtype and width (0: one number, no axis)."""
        layout = {"ids": (torch.int64, 0), "rows": (torch.float32, self.table.dim)}
        if self.state:
            layout |= {slot.name: (torch.float32, slot.width) for slot in self.table.slots}
            layout[STEP_SLOT] = (torch.int32, 0)
        return layout

    def row_bytes(self) -> int:
        return sum(dtype.itemsize * max(width, 1) for dtype, width in self.layout().values())

    def read(self, shard: Shard) -> dict[str, Tensor]:
        """Return the rows of this rank in a shard, by the names of `layout`."""
        a, b = int(self._starts[shard.first]), int(self._starts[shard.end])
        return {"ids": self._ids[a:b], **self.table.read(self._handles[a:b], state=self.state)}

    def count(self, first: int, end: int) -> int:
        """Return the number of rows on all ranks in buckets [first, end)."""
        return int(self.rows_per_bucket[first:end].sum())


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), torch.cumsum(counts, 0)])


def bucket_offsets(rows: LocalRows, shard: Shard) -> Tensor:
    """Return int64 [end - first + 1]: where the rows of each bucket of the shard begin and end."""
    return _offsets(rows.rows_per_bucket[shard.first : shard.end])


def collect_shards(
    tables: Sequence[LocalRows], shards: Sequence[Shard | None], exchange: Exchange
) -> dict[str, Tensor]:
    """Send the rows of shards[w] to rank w, for all ranks w, in one all-to-all. Collective.

    Returns "<table>.<tensor>" of the shard that this rank writes (empty when it writes none).
    """
    pieces = [[rows.read(shard) for rows in tables] if shard else [] for shard in shards]
    mine = shards[exchange.rank]
    if exchange.world_size == 1:
        assert mine is not None
        return {f"{t.name}.{n}": v for t, values in zip(tables, pieces[0], strict=True) for n, v in values.items()}
    buffers = [_to_bytes(tables, piece) for piece in pieces]
    sources = [_intersection(mine, r, exchange.world_size) for r in range(exchange.world_size)]
    sizes = [sum(t.count(*span) * t.row_bytes() for t in tables) for span in sources]
    received = exchange.all_to_all(torch.cat(buffers), [len(b) for b in buffers], sizes)
    parts = [_from_bytes(tables, b, span) for b, span in zip(received.split(sizes), sources, strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if mine else {}


def _intersection(shard: Shard | None, rank: int, world_size: int) -> tuple[int, int]:
    """The buckets of a shard that a rank owns, as (first, end)."""
    if shard is None:
        return 0, 0
    first, end = bucket_range(rank, world_size)
    first = max(first, shard.first)
    return first, max(first, min(end, shard.end))


def _to_bytes(tables: Sequence[LocalRows], piece: Sequence[Mapping[str, Tensor]]) -> Tensor:
    flat = [
        values[name].contiguous().view(-1).view(torch.uint8)
        for rows, values in zip(tables, piece, strict=False)  # no piece: nothing to send
        for name in rows.layout()
    ]
    return torch.cat([torch.empty(0, dtype=torch.uint8, device="cpu"), *flat])


def _from_bytes(tables: Sequence[LocalRows], buffer: Tensor, span: tuple[int, int]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    at = 0
    for rows in tables:
        n = rows.count(*span)
        for name, (dtype, width) in rows.layout().items():
            size = n * dtype.itemsize * max(width, 1)
            # A copy, because a view needs its storage to begin at a multiple of the item size.
            flat = buffer[at : at + size].clone().view(dtype)
            values[f"{rows.name}.{name}"] = flat.view(n, width) if width else flat
            at += size
    return values
