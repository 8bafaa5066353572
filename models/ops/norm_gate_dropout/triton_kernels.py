# mypy: ignore-errors
"""Kernels of LayerNorm, gate and keyed dropout: one program does a few rows, whole."""

import triton
import triton.language as tl
from grzoo.models.ops.keyed_dropout.triton_kernels import kept_by_dropout


@triton.jit
def normed_rows(x, eps, inside, width):
    """Return (x - mean) / sqrt(var + eps) and 1 / sqrt(var + eps), of rows [R, C] that are zero beyond the width."""
    mean = tl.sum(x, 1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    return centred * scale[:, None], scale


@triton.jit(do_not_specialize=["rows"])
def norm_gate_forward_kernel(
    x, gate, out, row_keys, rows, x_stride, gate_stride, eps, least, kept,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    inside = (t < rows)[:, None] & (columns < WIDTH)[None, :]
    values = tl.load(x + t[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate + t[:, None] * gate_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    normed, _ = normed_rows(values, eps, inside, WIDTH)
    result = normed * gates
    if DROPOUT:
        result *= tl.where(kept_by_dropout(row_keys, t, t < rows, columns, least), kept, 0.0)
    tl.store(out + t[:, None] * WIDTH + columns[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_gate_backward_kernel(
    x, gate, grad, dx, dgate, row_keys, rows, x_stride, gate_stride, grad_stride, eps, least, kept,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """With d = dy * factor * gate: dx = scale (d - mean(d) - normed mean(d normed)); dgate = dy * factor * normed."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    inside = (t < rows)[:, None] & (columns < WIDTH)[None, :]
    values = tl.load(x + t[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate + t[:, None] * gate_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    grads = tl.load(grad + t[:, None] * grad_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        grads *= tl.where(kept_by_dropout(row_keys, t, t < rows, columns, least), kept, 0.0)
    normed, scale = normed_rows(values, eps, inside, WIDTH)
    d = grads * gates
    mean = tl.sum(d, 1) / WIDTH
    along = tl.sum(d * normed, 1) / WIDTH
    result = scale[:, None] * (d - mean[:, None] - normed * along[:, None])
    place = t[:, None] * WIDTH + columns[None, :]
    tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(dgate + place, (grads * normed).to(dgate.dtype.element_ty), mask=inside)
