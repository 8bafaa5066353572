# mypy: ignore-errors
"""The kernel of keyed dropout: one program does a few rows, whole; other kernels draw the same mask."""

import triton
import triton.language as tl
from grzoo.embeddings.kernels.triton.bits import fold


@triton.jit
def kept_by_dropout(row_keys, t, valid, columns, least):
    """Return what dropout keeps, bool [R, C]: a function of the key of the token and the column."""
    keys = tl.load(row_keys + t, mask=valid, other=0).to(tl.uint64)
    bits = fold(keys[:, None], columns[None, :].to(tl.uint64))
    return (bits >> 40).to(tl.int32) >= least


@triton.jit(do_not_specialize=["rows"])
def keyed_dropout_kernel(
    x, out, row_keys, rows, x_stride, least, kept, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    inside = (t < rows)[:, None] & (columns < WIDTH)[None, :]
    values = tl.load(x + t[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    result = tl.where(kept_by_dropout(row_keys, t, t < rows, columns, least), values * kept, 0.0)
    tl.store(out + t[:, None] * WIDTH + columns[None, :], result.to(out.dtype.element_ty), mask=inside)
