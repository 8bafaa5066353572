"""The key index of a table on the device: (table, id) -> row."""

import torch
from torch import Tensor

from . import index_kernels as kernels
from .launch import WIDER, blocks, on

# Keys of a program, which is one warp. One key per lane of an AMD wavefront: triton 3.6 cannot compile tensors of
# compare-and-swap with more.
BLOCK = 64 * WIDER
_FIRST_CAPACITY = 1 << 10
_MAX_ROWS = (1 << 31) - 1  # what torch sorts on a GPU


class KeyIndex:
    """Open addressing with linear probing, at most half full: 32 to 64 bytes per key, 16 per slot.

    Erasing leaves no tombstones: the keys behind an erased one move up. Freed rows are used again, last freed first, so
    that rows are given in an order that does not depend on which lane wins a slot.
    """

    def __init__(self, device: torch.device, first_capacity: int = _FIRST_CAPACITY) -> None:
        assert first_capacity >= BLOCK and first_capacity & (first_capacity - 1) == 0
        self.device = device
        self.records = self._empty_records(first_capacity)  # int64 [capacity, 2]: id, tag (see index_kernels.py)
        self.free = torch.empty(0, dtype=torch.int64, device=device)  # freed rows
        self.num_free = 0  # how many of them are still free
        self.used = 0  # rows that were ever given
        self.rehashes = 0

    def _empty_records(self, capacity: int) -> Tensor:
        return torch.full((capacity, 2), -1, dtype=torch.int64, device=self.device)

    @property
    def capacity(self) -> int:
        """Number of slots, a power of two."""
        return len(self.records)

    def __len__(self) -> int:
        return self.used - self.num_free

    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.records.nbytes + self.free.nbytes

    def find(self, tables: Tensor, ids: Tensor, *, slots: bool = False) -> Tensor:
        """Return the rows int64 [n] (or the slots) of keys, -1 where absent. One launch."""
        found = torch.empty_like(ids)
        if n := len(ids):
            args = self.records, self.capacity, tables, ids, found, n
            with on(self.device):
                kernels.find_kernel[blocks(n, BLOCK)](*args, SLOTS=slots, BLOCK=BLOCK, num_warps=1)
        return found

    def reserve(self, count: int) -> None:
        """Make room for `count` more keys. Growth to twice the size or more is one launch over the old slots.

        Raises MemoryError beyond 2^31 - 1 rows.
        """
        if self.used + count > _MAX_ROWS:
            raise MemoryError(f"a table on one device holds at most {_MAX_ROWS} rows: shard it over more ranks")
        needed = 2 * (len(self) + count)
        if needed <= self.capacity:
            return
        old, capacity = self.records, 1 << (needed - 1).bit_length()
        records = self._empty_records(capacity)
        with on(self.device):
            grid = blocks(len(old), BLOCK)
            kernels.rehash_kernel[grid](old, records, capacity, BLOCK=BLOCK, num_warps=1)
        self.records = records
        self.rehashes += 1

    def insert(self, tables: Tensor, ids: Tensor, missing: Tensor, handles: Tensor) -> Tensor:
        """Insert the distinct absent keys at the positions `missing` int64 [m]; `reserve(m)` came before.

        Writes their rows into `handles` int64 [n] and returns them, int64 [m]. One launch.
        """
        m, new = len(missing), torch.empty_like(missing)
        args = self.records, self.capacity, tables, ids, missing, self.free, self.num_free, self.used, handles, new, m
        with on(self.device):
            kernels.insert_kernel[blocks(m, BLOCK)](*args, BLOCK=BLOCK, num_warps=1)
        reused = min(m, self.num_free)
        self.num_free -= reused
        self.used += m - reused
        return new

    def erase(self, tables: Tensor, ids: Tensor) -> int:
        """Delete keys (which may repeat or be absent) and return how many there were. Two waits for the device."""
        slots = self.find(tables, ids, slots=True)
        slots = torch.unique(slots[slots >= 0])
        n = len(slots)
        if n == 0:
            return 0
        tags = self.records[:, 1]
        freed = (tags[slots] & 0xFFFFFFFF).sort(descending=True).values  # by row: slots depend on who won them
        tags.index_fill_(0, slots, -2)
        leads = torch.empty(n, dtype=torch.int32, device=self.device)
        args = self.records, self.capacity, slots, leads, n
        with on(self.device):
            kernels.leader_kernel[blocks(n, BLOCK)](*args, BLOCK=BLOCK, num_warps=1)
            kernels.repair_kernel[blocks(n, BLOCK)](*args, BLOCK=BLOCK, num_warps=1)
        self.free = torch.cat([self.free[: self.num_free], freed])
        self.num_free += n
        return n

    def keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return tables int32 [n], ids int64 [n] and rows int64 [n] of all keys, ordered by row."""
        taken = self.records[self.records[:, 1] >= 0]
        # The key of each row that was ever given, which takes half the memory of sorting.
        place = torch.full((self.used,), -1, dtype=torch.int64, device=self.device)
        place[taken[:, 1] & 0xFFFFFFFF] = torch.arange(len(taken), dtype=torch.int64, device=self.device)
        rows = (place >= 0).nonzero().flatten()
        taken = taken[place[rows]]
        return (taken[:, 1] >> 32).to(torch.int32), taken[:, 0].contiguous(), rows
