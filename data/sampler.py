"""The order of an epoch: global batches from a position (seed, epoch, cursor), by a permutation computed on the fly."""

import warnings
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .jagged import Int64
from .keyed import SITE_BLOCK, SITE_ORDER, UInt64, as_words, fold, keyed, mix64

GROUP = 64

_ROUNDS = 4
_LOOK_AHEAD = 1 << 13


def permute(positions: ArrayLike, size: int, key: int | UInt64) -> Int64:
    """Where a keyed permutation of 0..size-1 sends `positions` (int [n], each below `size`); int64 [n].

    A Feistel network over the next power of two, repeated on results that fall outside (cycle walking: Black and
    Rogaway, Ciphers with arbitrary finite domains, 2002): the expected number of repeats is below one.
    """
    values = as_words(np.array(positions, dtype=np.int64))
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < size:
        raise ValueError(f"positions must lie in [0, {size}), got {values.min()} to {values.max()}")
    bits = max(2, int(size - 1).bit_length())
    keys = fold(key, np.arange(_ROUNDS))
    values = _feistel(values, bits, keys)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        walked = _feistel(values[outside], bits, keys)
        values[outside] = walked
        outside = outside[walked >= size]
    return values.view(np.int64)


def _feistel(values: UInt64, bits: int, keys: UInt64) -> UInt64:
    low_bits, high_bits = np.uint64(bits - bits // 2), np.uint64(bits // 2)
    low_mask, high_mask = (np.uint64((1 << int(width)) - 1) for width in (low_bits, high_bits))
    low, high = values & low_mask, values >> low_bits
    for step in range(0, len(keys), 2):
        high = high ^ (mix64(low ^ keys[step]) & high_mask)
        low = low ^ (mix64(high ^ keys[step + 1]) & low_mask)
    return (high << low_bits) | low


def permute_blocks(positions: ArrayLike, size: int, block_size: int, key: int | UInt64) -> Int64:
    """As `permute`, but positions that are near each other go to rows of few blocks; int64 [n].

    Blocks begin at a keyed row and are permuted; rows are permuted within GROUP blocks. The rows beyond the last whole
    block close the epoch: other ones for every key.
    """
    index = np.array(positions, dtype=np.int64)
    blocks, width = size // block_size, GROUP * block_size
    whole = blocks * block_size
    out = np.empty_like(index)
    for group in np.unique(index // width).tolist():
        for first, last in ((group * width, min(group * width + width, whole)), (whole, size)):
            here = np.flatnonzero((index >= max(first, group * width)) & (index < min(last, group * width + width)))
            if not len(here):
                continue
            local = permute(index[here] - first, last - first, fold(key, first))
            if first < whole:
                block = permute(first // block_size + local // block_size, blocks, fold(key, SITE_ORDER))
                local = block * block_size + local % block_size - first
            out[here] = first + local
    offset = int(mix64(fold(key, size))) % size
    return (out + offset) % size


class GlobalBatchSampler:
    """Global batches of rows; a position is (seed, epoch, cursor = rows of the epoch already served).

    rows: the number of rows, or anything with a length.  global_batch_size: rows (users) of a batch over all ranks.
    shuffle: a new keyed permutation every epoch; False keeps the order of the rows.
    drop_last: leave out the last, smaller batch of an epoch.
    block_size: shuffle blocks of so many neighbouring rows, and rows only among GROUP blocks that follow each other in
    that order: for logs larger than the page cache, of which a part is then read at a time. None shuffles all rows.

    Batches depend on the position alone: any number of ranks and workers sees the same ones, and any of them can start
    anywhere. Iterating serves the rest of the current epoch and moves the position.

        sampler = GlobalBatchSampler(len(dataset), 128, seed=7)
        rows = sampler.batch_at(epoch=0, cursor=256)
    """

    def __init__(
        self,
        rows: int | Sized,
        global_batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        block_size: int | None = None,
    ) -> None:
        self.num_rows = rows if isinstance(rows, int) else len(rows)
        if self.num_rows < 1:
            raise ValueError("there are no rows to sample from: the split is empty")
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size must be at least 1, got {global_batch_size}")
        if drop_last and self.num_rows < global_batch_size:
            raise ValueError(
                f"drop_last leaves no batch: {self.num_rows} rows are fewer than global_batch_size={global_batch_size}"
            )
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size must be at least 1 row, got {block_size}; None shuffles all rows")
        if block_size is not None and not shuffle:
            warnings.warn("block_size has no effect without shuffle", stacklevel=2)
        self.block_size = block_size
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self.cursor = 0
        self._ahead: tuple[int, Int64] = (0, np.zeros(0, dtype=np.int64))
        self._ahead_of = -1

    @property
    def rows_per_epoch(self) -> int:
        """Rows that an epoch serves: all, or whole batches only with `drop_last`."""
        left_out = self.num_rows % self.global_batch_size if self.drop_last else 0
        return self.num_rows - left_out

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-self.rows_per_epoch // self.global_batch_size)

    def batch_at(self, epoch: int, cursor: int) -> Int64:
        """The rows of the batch at (epoch, cursor), int64 [<= global_batch_size], none beyond the epoch's end."""
        stop = min(cursor + self.global_batch_size, self.rows_per_epoch)
        if not self.shuffle:
            return np.arange(cursor, max(cursor, stop), dtype=np.int64)
        first, rows = self._ahead
        if self._ahead_of != epoch or not first <= cursor <= stop <= first + len(rows):
            self._look_ahead(epoch, cursor)
            first, rows = self._ahead
        return rows[cursor - first : max(cursor, stop) - first].copy()

    def _look_ahead(self, epoch: int, cursor: int) -> None:
        """Permute many batches at once: a call costs far more than a position."""
        stop = min(cursor + max(_LOOK_AHEAD, self.global_batch_size), self.rows_per_epoch)
        positions = np.arange(cursor, max(cursor, stop), dtype=np.int64)
        self._ahead_of = epoch
        self._ahead = cursor, self._order(positions, epoch)

    def _order(self, positions: Int64, epoch: int) -> Int64:
        if self.block_size is None:
            return permute(positions, self.num_rows, keyed(self.seed, SITE_ORDER, epoch))
        return permute_blocks(positions, self.num_rows, self.block_size, keyed(self.seed, SITE_BLOCK, epoch))

    def next_position(self, epoch: int, cursor: int) -> tuple[int, int]:
        """The position after the batch at (epoch, cursor); (epoch + 1, 0) after the last of an epoch."""
        after = cursor + self.global_batch_size
        return (epoch, after) if after < self.rows_per_epoch else (epoch + 1, 0)

    def step_at(self, epoch: int, cursor: int) -> int:
        """The number, from 0, of the optimizer step at (epoch, cursor)."""
        return epoch * len(self) + -(-cursor // self.global_batch_size)

    def positions(self, epoch: int, cursor: int = 0) -> list[tuple[int, int]]:
        """The positions from (epoch, cursor) to the end of that epoch."""
        return [(epoch, at) for at in range(cursor, self.rows_per_epoch, self.global_batch_size)]

    def __iter__(self) -> Iterator[Int64]:
        for epoch, cursor in self.positions(self.epoch, self.cursor):
            self.epoch, self.cursor = self.next_position(epoch, cursor)
            yield self.batch_at(epoch, cursor)

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON values; independent of the world size."""
        order = {"seed": self.seed, "num_rows": self.num_rows, "block_size": self.block_size}
        return {**order, "epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position; ValueError when it belongs to another order of rows."""
        for name in ("seed", "num_rows", "block_size"):
            own = getattr(self, name)
            if state.get(name) != own:
                raise ValueError(
                    f"the saved position has {name}={state.get(name)}, this sampler has {own}: the order would "
                    f"differ; use the saved {name}"
                )
        self.epoch, self.cursor = int(state["epoch"]), int(state["cursor"])
