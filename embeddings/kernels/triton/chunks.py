"""Rows in chunks that never move, found through a table of their pointers on the device."""

import torch
import triton
from torch import Tensor

from . import row_kernels as kernels
from .launch import WIDER, blocks, on

_ONE_CHUNK = 40  # a shift that puts any number of rows into the first chunk
_TILE = 1024  # elements of a program: 8 per thread of four warps


def shape_of(width: int, shift: int) -> dict[str, int]:
    """Compile-time arguments of the kernels that read or write whole rows of a width."""
    padded = triton.next_power_of_2(width)
    rows = WIDER * min(128, max(1, _TILE // padded))
    return {"WIDTH": width, "PADDED": padded, "SHIFT": shift, "ROWS": rows}


class Chunks:
    """Rows of `width` elements of four bytes (float32 or int32), 2^shift rows in a chunk."""

    def __init__(self, width: int, shift: int, dtype: torch.dtype, device: torch.device) -> None:
        assert dtype.itemsize == 4
        self.width, self.shift, self.dtype, self.device = width, shift, dtype, device
        self.chunks: list[Tensor] = []
        self.pointers = torch.empty(0, dtype=torch.int64, device=device)  # the chunks' addresses

    @classmethod
    def holding(cls, values: Tensor) -> "Chunks":
        """Return rows in one chunk that is the tensor [n, width] itself: handle i is row i."""
        rows = cls(values.shape[1], _ONE_CHUNK, values.dtype, values.device)
        rows.chunks = [values]
        # the address goes as an argument of a launch, which nobody waits for
        rows.pointers = torch.full((1,), values.data_ptr(), dtype=torch.int64, device=values.device)
        return rows

    @property
    def capacity(self) -> int:
        """Number of rows that the chunks have room for."""
        return len(self.chunks) << self.shift

    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.pointers.nbytes + sum(chunk.nbytes for chunk in self.chunks)

    def new_chunks(self, rows: int) -> list[Tensor]:
        """Allocate what is missing for `rows` rows, without taking it in."""
        missing = max(0, -(-rows // (1 << self.shift)) - len(self.chunks))
        shape = (1 << self.shift, self.width)
        return [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(missing)]

    def append(self, chunks: list[Tensor]) -> None:
        """Take chunks in. Copies their addresses to the device, when there are any."""
        if chunks:
            self.chunks += chunks
            addresses = torch.tensor([chunk.data_ptr() for chunk in chunks], dtype=torch.int64, device="cpu")
            self.pointers = torch.cat([self.pointers, addresses.to(self.device)])

    @property
    def shape(self) -> dict[str, int]:
        """Compile-time arguments of the kernels that read or write whole rows."""
        return shape_of(self.width, self.shift)

    def gather(self, handles: Tensor, out: Tensor | None = None) -> Tensor:
        """Return [n, width], zeros where the handle is -1; in `out` (contiguous, on the device) when given."""
        n = len(handles)
        if out is None:
            out = torch.empty(n, self.width, dtype=self.dtype, device=self.device)
        if n:
            shape = self.shape
            with on(self.device):
                grid = blocks(n, shape["ROWS"])
                kernels.gather_kernel[grid](self.pointers, handles, out.view(torch.int32), n, **shape)
        return out

    def scatter(self, handles: Tensor, values: Tensor) -> None:
        """Overwrite rows with values [n, width] of this dtype. Handles are distinct."""
        assert values.dtype == self.dtype
        if n := len(handles):
            shape = self.shape
            source = values.contiguous().view(torch.int32)
            with on(self.device):
                kernels.scatter_kernel[blocks(n, shape["ROWS"])](self.pointers, handles, source, n, **shape)

    def fill(self, handles: Tensor, value: float) -> None:
        """Set every element of rows to `value`, which is 0 for int32 rows."""
        assert self.dtype == torch.float32 or value == 0
        if n := len(handles):
            shape = self.shape
            with on(self.device):
                kernels.fill_kernel[blocks(n, shape["ROWS"])](self.pointers, handles, float(value), n, **shape)
