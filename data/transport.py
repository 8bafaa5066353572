"""Steps on their way from a worker process: arrays in shared memory that is written again and again.

A worker has a ring of blocks. One is filled for every step; where it lies travels, and the block itself only when it
is new or had to grow. The process that asked for the step reads the arrays in place, before it asks for the next one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

Arrays = dict[str, NDArray[Any]]

_ALIGNMENT = 64
_ROOM = 1.5  # a block that grows is made this much larger than what it must hold


@dataclass(frozen=True)
class Parcel:
    """Where the arrays of a step lie: name -> (dtype, shape, first byte) in block `slot` of `worker`.

    block: uint8 [bytes] in shared memory when it has not travelled before.
    """

    worker: int
    slot: int
    layout: dict[str, tuple[str, tuple[int, ...], int]]
    block: torch.Tensor | None


class BlockRing:
    """A worker's blocks: at most `slots` parcels of a worker may be under way or in use at a time."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._blocks: dict[int, torch.Tensor] = {}
        self._sent = 0

    def pack(self, arrays: Arrays) -> Parcel:
        """Copy the arrays into the next block."""
        layout: dict[str, tuple[str, tuple[int, ...], int]] = {}
        size = 0
        for name, values in arrays.items():
            layout[name] = (values.dtype.str, values.shape, size)
            size += -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
        slot = self._sent % self.slots
        self._sent += 1
        fresh = slot not in self._blocks or len(self._blocks[slot]) < size
        if fresh:
            self._blocks[slot] = torch.empty(max(1, int(_ROOM * size)), dtype=torch.uint8).share_memory_()
        block = self._blocks[slot]
        for name, values in _views(block, layout).items():
            np.copyto(values, arrays[name])
        info = get_worker_info()
        return Parcel(info.id if info else 0, slot, layout, block if fresh else None)


class Receiver:
    """Reads parcels; what it returns is valid until `slots` more parcels of that worker were packed."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, int], torch.Tensor] = {}

    def unpack(self, parcel: Parcel) -> Arrays:
        """The arrays, views of the block."""
        key = (parcel.worker, parcel.slot)
        if parcel.block is not None:
            self._blocks[key] = parcel.block
        return _views(self._blocks[key], parcel.layout)


def _views(block: torch.Tensor, layout: dict[str, tuple[str, tuple[int, ...], int]]) -> Arrays:
    memory = block.numpy()
    return {
        name: np.ndarray(shape, dtype=dtype, buffer=memory, offset=offset if 0 not in shape else 0)
        for name, (dtype, shape, offset) in layout.items()
    }
