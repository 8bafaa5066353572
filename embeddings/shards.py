"""How the rows of all tables are cut into files, and files into pieces: by ranges of buckets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from .exchange import Exchange
from .files import BLOCK
from .hashing import NUM_BUCKETS, bucket, bucket_range
from .tensor_file import TensorFileWriter, as_bytes, file_order

IDS, OFFSETS = "ids", "bucket_offsets"
Column = tuple[torch.dtype, int]  # dtype and width; width 0: one number per row, without an axis

_HASHED_AT_ONCE = 1 << 20  # ids


@dataclass(frozen=True)
class Shard:
    """One file: the rows of all tables whose buckets are in [first, end)."""

    file: str
    first: int
    end: int


def plan_shards(bytes_per_bucket: Tensor, max_bytes: int) -> list[Shard]:
    """Cut the buckets, int64 [NUM_BUCKETS] bytes each, into the fewest ranges of at most max_bytes (or one bucket)."""
    cuts = _cut(_offsets(bytes_per_bucket), 0, NUM_BUCKETS, max_bytes)
    n = len(cuts)
    return [Shard(f"embeddings-{i + 1:05d}-of-{n:05d}.safetensors", *cuts[i]) for i in range(n)]


def _cut(offsets: Tensor, first: int, end: int, limit: int) -> list[tuple[int, int]]:
    """Cut buckets [first, end) into the fewest ranges over which `offsets` grow by `limit` at most (or one bucket)."""
    cuts: list[tuple[int, int]] = []
    while first < end:
        fits = int(torch.searchsorted(offsets, offsets[first] + limit, right=True)) - 1
        cuts.append((first, min(max(fits, first + 1), end)))
        first = cuts[-1][1]
    return cuts


class ShardedRows:
    """Rows with 64-bit ids that go into shards: this rank's in the order (bucket, id), and all ranks' numbers of them.

    Args:
        name: what its tensors in the files begin with: "<name>.ids", "<name>.<column>", "<name>.bucket_offsets".
        ids: int64 [n] of this rank, sorted by (bucket, id).
        columns: the tensors that go beside the ids.
        read: read(column, start, stop, out) puts the values of this rank's rows [start, stop) of a column there.
    """

    def __init__(
        self, name: str, ids: Tensor, columns: Mapping[str, Column], read: Callable[[str, int, int, Tensor], object]
    ) -> None:
        self.name = name
        self.columns: dict[str, Column] = {IDS: (torch.int64, 0), **columns}
        self._ids, self._read = ids, read
        self.local_rows_per_bucket = torch.zeros(NUM_BUCKETS, dtype=torch.int64, device="cpu")
        for part in ids.split(_HASHED_AT_ONCE):
            self.local_rows_per_bucket += torch.bincount(bucket(part), minlength=NUM_BUCKETS)
        self._starts = _offsets(self.local_rows_per_bucket)
        self.set_rows_per_bucket(self.local_rows_per_bucket)

    def set_rows_per_bucket(self, rows_per_bucket: Tensor) -> None:
        """Take the numbers of rows of all ranks in each bucket, int64 [NUM_BUCKETS]."""
        self.offsets = _offsets(rows_per_bucket)  # int64 [NUM_BUCKETS + 1]

    def row_bytes(self) -> int:
        """Bytes of a row in the file."""
        return sum(column_bytes(column) for column in self.columns.values())

    def count(self, first: int, end: int) -> int:
        """Number of rows on all ranks in buckets [first, end)."""
        return int(self.offsets[end] - self.offsets[first])

    def read(self, column: str, first: int, end: int, out: Tensor) -> None:
        """Put the bytes of a column for this rank's rows in buckets [first, end) into `out`, uint8."""
        start, stop = int(self._starts[first]), int(self._starts[end])
        kind = self.columns[column]
        values = out.view(kind[0]).view(column_shape(kind, stop - start))
        if column == IDS:
            values.copy_(self._ids[start:stop])
        else:
            self._read(column, start, stop, values)


def column_bytes(column: Column) -> int:
    """Bytes of one row of a column."""
    dtype, width = column
    return dtype.itemsize * max(width, 1)


def column_shape(column: Column, rows: int) -> tuple[int, ...]:
    """Shape of a column of so many rows."""
    return (rows, column[1]) if column[1] else (rows,)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), torch.cumsum(counts, 0)])


class Piece(NamedTuple):
    """A run of bytes of a shard that lies on one rank."""

    rows: ShardedRows
    column: str
    first: int  # bucket
    end: int  # bucket
    source: int  # rank

    def num_bytes(self) -> int:
        if self.column == OFFSETS:
            return 8 * (self.end - self.first + 1)
        return self.rows.count(self.first, self.end) * column_bytes(self.rows.columns[self.column])

    def read(self, out: Tensor) -> None:
        """Put its bytes into `out`, uint8 [num_bytes()]; called on `source`."""
        if self.column == OFFSETS:
            out.copy_(as_bytes(self.rows.offsets[self.first : self.end + 1] - self.rows.offsets[self.first]))
        else:
            self.rows.read(self.column, self.first, self.end, out)


class ShardPlan:
    """The tensors of a shard and the pieces, in the order of the file, that they are written in.

    Args:
        shard: the file.
        row_sets: what it has rows of.
        writer: the rank that writes it.
        world_size: number of ranks.
        piece_bytes: bound of a piece (a bucket is never cut).
    """

    def __init__(
        self, shard: Shard, row_sets: Sequence[ShardedRows], *, writer: int, world_size: int, piece_bytes: int
    ) -> None:
        self.shard = shard
        self.layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.pieces: list[Piece] = []
        owners: dict[str, tuple[ShardedRows, str]] = {}
        for rows in row_sets:
            count = rows.count(shard.first, shard.end)
            for column, kind in rows.columns.items():
                self.layout[f"{rows.name}.{column}"] = (kind[0], column_shape(kind, count))
                owners[f"{rows.name}.{column}"] = rows, column
            self.layout[f"{rows.name}.{OFFSETS}"] = (torch.int64, (shard.end - shard.first + 1,))
            owners[f"{rows.name}.{OFFSETS}"] = rows, OFFSETS
        for name in file_order(self.layout):
            rows, column = owners[name]
            if column == OFFSETS:
                self.pieces.append(Piece(rows, column, shard.first, shard.end, writer))
                continue
            for source in range(world_size):
                first, end = bucket_range(source, world_size)
                limit = max(piece_bytes // column_bytes(rows.columns[column]), 1)
                for cut in _cut(rows.offsets, max(first, shard.first), min(end, shard.end), limit):
                    if rows.count(*cut):
                        self.pieces.append(Piece(rows, column, *cut, source))


def write_pieces(
    plans: Sequence[ShardPlan | None],
    exchange: Exchange,
    writer: TensorFileWriter | None,
    attempt: Callable[[Callable[[], None]], object],
) -> None:
    """Write this rank's shard piece by piece, plans[w] being that of rank w. Collective.

    Pieces that lie on other ranks come by all-to-all; nothing is sent while all ranks write rows of their own.

    Args:
        plans: what each rank writes in this turn.
        exchange: the ranks.
        writer: of this rank's file; None when it has none, or could not be opened.
        attempt: runs a reading or a writing; where one fails it keeps the problem and runs no more. What is sent then
            is of no use, but the other ranks are not left waiting.
    """
    schedules = [plan.pieces if plan else [] for plan in plans]
    for pieces in zip_longest(*schedules):
        mine = pieces[exchange.rank]
        if all(piece is None or piece.source == rank for rank, piece in enumerate(pieces)):
            if mine is not None and writer is not None:
                attempt(partial(_write, mine, writer))
            continue
        sent = [_to_send(piece, exchange.rank, attempt) for piece in pieces]
        received = [0] * exchange.world_size
        if mine is not None:
            received[mine.source] = mine.num_bytes()
        arrived = exchange.all_to_all(torch.cat(sent), [len(part) for part in sent], received)
        if writer is not None:
            attempt(partial(writer.write, arrived))


def _write(piece: Piece, writer: TensorFileWriter) -> None:
    size = piece.num_bytes()
    if size <= BLOCK:
        piece.read(writer.reserve(size))
        return
    values = torch.empty(size, dtype=torch.uint8, device="cpu")
    piece.read(values)
    writer.write(values)


def _to_send(piece: Piece | None, rank: int, attempt: Callable[[Callable[[], None]], object]) -> Tensor:
    if piece is None or piece.source != rank:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    values = torch.empty(piece.num_bytes(), dtype=torch.uint8, device="cpu")
    attempt(partial(piece.read, values))
    return values
