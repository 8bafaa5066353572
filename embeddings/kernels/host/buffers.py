"""Large tensors in memory that is used again: fresh pages cost more than most of what a kernel does with them.

The system clears every page at its first touch, and the allocator gives large blocks back when a tensor dies: a step
would pay for them each time. Here the memory of a dead tensor waits for the next one of its size.
"""

import ctypes
import weakref

import torch
from torch import Tensor

from .library import library

_LARGE = 1 << 20  # bytes; smaller tensors are left to torch
_PAGE = 2 << 20  # bytes of a huge page
_MAX_WAITING = 512 << 20  # bytes

# By size, blocks of dead tensors. Without a lock, which a fork could copy while it is held: append and pop are atomic.
_waiting: dict[int, list[Tensor]] = {}


def empty_rows(n: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an uninitialised tensor [n, dim] in host memory; a large one begins on a page."""
    size = n * dim * dtype.itemsize
    if size < _LARGE:
        return torch.empty(n, dim, dtype=dtype, device="cpu")
    block = _take(size)
    start = -block.data_ptr() % _PAGE
    lease = (ctypes.c_char * (len(block) - _PAGE)).from_address(block.data_ptr() + start)
    weakref.finalize(lease, _give_back, block).atexit = False
    return torch.frombuffer(lease, dtype=dtype, count=n * dim).view(n, dim)


def _take(size: int) -> Tensor:
    """Return a block with room for `size` bytes from a border of huge pages on."""
    step = 1 << max(size.bit_length() - 3, 18)  # by quarters of a power of two: steps differ a little in their ids
    length = -(-size // step) * step + _PAGE
    try:
        return _waiting[length].pop()
    except (KeyError, IndexError):
        block = torch.empty(length, dtype=torch.uint8, device="cpu")
        library().grzoo_use_huge_pages(block.data_ptr(), length)
        return block


def _give_back(block: Tensor) -> None:
    if len(block) > _MAX_WAITING:
        return
    waiting = sum(length * len(blocks) for length, blocks in list(_waiting.items()))
    if waiting + len(block) > _MAX_WAITING:
        _waiting.clear()
    _waiting.setdefault(len(block), []).append(block)
