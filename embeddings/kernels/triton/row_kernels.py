# mypy: ignore-errors
"""Kernels that move rows between chunks and contiguous tensors, and write initial values.

Chunks are addressed through a table of their pointers; a handle is chunk * 2^SHIFT + row in the chunk. Elements have
four bytes and are moved as int32, whatever they are. A program takes ROWS rows of width WIDTH (padded to PADDED).
"""

import triton
import triton.language as tl

from .bits import fold


@triton.jit
def row_pointers(chunks, handles, live, dtype: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr):
    """Return pointers [ROWS] to the first element of rows."""
    chunk = tl.load(chunks + (handles >> SHIFT), mask=live, other=0)
    address = chunk + (handles & ((1 << SHIFT) - 1)) * (4 * WIDTH)
    pointer = address.to(tl.pointer_type(dtype))
    if WIDTH % 4 == 0:
        pointer = tl.multiple_of(pointer, 16)  # nothing else says that chunks are aligned: loads would be scalar
    return pointer


@triton.jit
def tile_mask(live, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Return the mask [ROWS, PADDED] of rows that are live."""
    mask = tl.broadcast_to(live[:, None], (live.shape[0], PADDED))
    if WIDTH != PADDED:
        mask = mask & (tl.arange(0, PADDED)[None, :] < WIDTH)
    return mask


@triton.jit
def tile_of(pointers, PADDED: tl.constexpr):
    """Return pointers [ROWS, PADDED] to the elements of rows."""
    return pointers[:, None] + tl.arange(0, PADDED)[None, :]


@triton.jit(do_not_specialize=["n"])
def gather_kernel(
    chunks, handles, out, n, WIDTH: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr
):
    """out[i] = the row handles[i]; zeros where the handle is -1."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    handle = tl.load(handles + i, mask=i < n, other=-1)
    known = handle >= 0
    source = tile_of(row_pointers(chunks, handle, known, tl.int32, WIDTH, SHIFT), PADDED)
    row = tl.load(source, mask=tile_mask(known, WIDTH, PADDED), other=0)
    tl.store(tile_of(out + i * WIDTH, PADDED), row, mask=tile_mask(i < n, WIDTH, PADDED))


@triton.jit(do_not_specialize=["n"])
def scatter_kernel(
    chunks, handles, values, n, WIDTH: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr
):
    """The row handles[i] = values[i]. Handles are distinct."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = i < n
    handle = tl.load(handles + i, mask=live, other=0)
    mask = tile_mask(live, WIDTH, PADDED)
    row = tl.load(tile_of(values + i * WIDTH, PADDED), mask=mask)
    tl.store(tile_of(row_pointers(chunks, handle, live, tl.int32, WIDTH, SHIFT), PADDED), row, mask=mask)


@triton.jit(do_not_specialize=["n"])
def round_kernel(values, keys, steps, out, n, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """out[i] = the float32 row i of values (as int32), rounded up or down to bfloat16 (as int16): see rounding.py."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = i < n
    mask = tile_mask(live, WIDTH, PADDED)
    key = fold(
        tl.load(keys + i, mask=live, other=0).to(tl.uint64), tl.load(steps + i, mask=live, other=0).to(tl.uint64)
    )
    noise = (fold(key[:, None], tl.arange(0, PADDED)[None, :].to(tl.uint64)) >> 48).to(tl.int32)
    bits = tl.load(tile_of(values + i * WIDTH, PADDED), mask=mask, other=0)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = tl.where(is_nan, 0x7FC0, (bits + noise) >> 16)
    tl.store(tile_of(out + i * WIDTH, PADDED), rounded.to(tl.int16), mask=mask)


@triton.jit(do_not_specialize=["n"])
def fill_kernel(
    chunks, handles, value, n, WIDTH: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr
):
    """Every element of the row handles[i] = value (float32)."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = i < n
    handle = tl.load(handles + i, mask=live, other=0)
    target = tile_of(row_pointers(chunks, handle, live, tl.float32, WIDTH, SHIFT), PADDED)
    tl.store(target, tl.zeros((ROWS, PADDED), tl.float32) + value, mask=tile_mask(live, WIDTH, PADDED))


@triton.jit
def initial_tile(laws, factors, quantiles, tables, ids, live, PADDED: tl.constexpr):
    """Return the initial values float32 [ROWS, PADDED] of keys; see `RowInit` for the formulas.

    laws int64 [tables, 2] holds (kind, key), with kind -1 uniform, -2 constant, q >= 0 the q-th table of quantiles;
    factors float32 [tables] is what is multiplied; quantiles float32 [q, 65536]. One multiplication, which no compiler
    can fuse with anything: the bits are those of every other backend.
    """
    kind = tl.load(laws + tables * 2, mask=live, other=-2)[:, None]
    key = tl.load(laws + tables * 2 + 1, mask=live, other=0).to(tl.uint64)
    factor = tl.load(factors + tables, mask=live, other=0.0)[:, None]
    column = tl.arange(0, PADDED).to(tl.uint64)
    bits = fold(fold(key, ids.to(tl.uint64))[:, None], column[None, :])
    signed = ((bits >> 40).to(tl.int32) - (1 << 23)).to(tl.float32)
    place = tl.maximum(kind, 0) * 65536 + (bits >> 48).to(tl.int64)
    quantile = tl.load(quantiles + place, mask=(kind >= 0) & live[:, None], other=1.0)
    return factor * tl.where(kind == -1, signed, quantile)


@triton.jit(do_not_specialize=["n"])
def initialize_kernel(
    chunks, handles, laws, factors, quantiles, tables, ids, positions, n,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The row handles[k] = the initial value of the key at positions[k]."""
    k = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = k < n
    handle = tl.load(handles + k, mask=live, other=0)
    position = tl.load(positions + k, mask=live, other=0)
    table = tl.load(tables + position, mask=live, other=0)
    key_id = tl.load(ids + position, mask=live, other=0)
    value = initial_tile(laws, factors, quantiles, table, key_id, live, PADDED)
    target = tile_of(row_pointers(chunks, handle, live, tl.float32, WIDTH, SHIFT), PADDED)
    tl.store(target, value, mask=tile_mask(live, WIDTH, PADDED))


@triton.jit(do_not_specialize=["n"])
def gather_initial_kernel(
    chunks, handles, laws, factors, quantiles, tables, ids, out, n,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[i] = the row handles[i]; the initial value of key i where the handle is -1."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = i < n
    handle = tl.load(handles + i, mask=live, other=0)
    known = live & (handle >= 0)
    source = tile_of(row_pointers(chunks, handle, known, tl.float32, WIDTH, SHIFT), PADDED)
    value = tl.load(source, mask=tile_mask(known, WIDTH, PADDED), other=0.0)
    absent = live & (handle < 0)
    if tl.max(absent.to(tl.int32), axis=0) > 0:
        table = tl.load(tables + i, mask=absent, other=0)
        key_id = tl.load(ids + i, mask=absent, other=0)
        fresh = initial_tile(laws, factors, quantiles, table, key_id, absent, PADDED)
        value = tl.where(absent[:, None], fresh, value)
    tl.store(tile_of(out + i * WIDTH, PADDED), value, mask=tile_mask(live, WIDTH, PADDED))
