# mypy: ignore-errors
"""Kernels of the optimizer rules (`kernels/rules.py`): rows, state and gradients are read once and written once.

`row_chunks`, `sum_chunks`, ... are tables of chunk pointers as in `row_kernels.py`; `grads` float32 [n, WIDTH].
Square roots and quotients are those of IEEE, as on the CPU: the memory, not they, takes the time.
"""

import triton
import triton.language as tl

from .row_kernels import row_pointers, tile_mask, tile_of


@triton.jit
def start(handles, n, ROWS: tl.constexpr):
    """Return (i, live, handle) of the rows of this program."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = i < n
    return i, live, tl.load(handles + i, mask=live, other=0)


@triton.jit(do_not_specialize=["n"])
def count_kernel(
    step_chunks, handles, corrections, lr, step, log_beta1, log_beta1_rest, log_beta2, log_beta2_rest, n,
    ADAM: tl.constexpr, GLOBAL: tl.constexpr, MAX: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Increase the step of each row, up to MAX; with ADAM, corrections[i] = (lr / (1 - beta1^t), sqrt(1 - beta2^t)).

    corrections: float32 [n, 2]. t is `step` with GLOBAL, else the row's own. In float64, as 1 - beta^t loses its
    digits in float32; the logarithms come in two float32 parts. One lane per row: in the update kernel many share one.
    """
    i, live, handle = start(handles, n, ROWS)
    pointer = row_pointers(step_chunks, handle, live, tl.int32, 1, SHIFT)
    steps = tl.load(pointer, mask=live, other=0)
    steps += (steps < MAX).to(tl.int32)
    tl.store(pointer, steps, mask=live)
    if ADAM:
        clock = steps.to(tl.float64)
        if GLOBAL:
            clock = clock * 0 + step
        decay1 = tl.exp(clock * log_beta1 + clock * log_beta1_rest)
        decay2 = tl.exp(clock * log_beta2 + clock * log_beta2_rest)
        tl.store(corrections + i * 2, ((clock * 0 + lr) / (1.0 - decay1)).to(tl.float32), mask=live)
        tl.store(corrections + i * 2 + 1, tl.sqrt_rn((1.0 - decay2).to(tl.float32)), mask=live)


@triton.jit(do_not_specialize=["n"])
def sgd_kernel(
    row_chunks, momentum_chunks, handles, grads, lr, momentum, weight_decay, n,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """g += wd p; b = momentum b + g; p -= lr b."""
    i, live, handle = start(handles, n, ROWS)
    mask = tile_mask(live, WIDTH, PADDED)
    row = tile_of(row_pointers(row_chunks, handle, live, tl.float32, WIDTH, SHIFT), PADDED)
    p = tl.load(row, mask=mask, other=0.0)
    g = tl.load(tile_of(grads + i * WIDTH, PADDED), mask=mask, other=0.0)
    if DECAY:
        g += weight_decay * p
    if MOMENTUM:
        buffer = tile_of(row_pointers(momentum_chunks, handle, live, tl.float32, WIDTH, SHIFT), PADDED)
        g += momentum * tl.load(buffer, mask=mask, other=0.0)
        tl.store(buffer, g, mask=mask)
    tl.store(row, p - lr * g, mask=mask)


@triton.jit(do_not_specialize=["n"])
def adagrad_kernel(
    row_chunks, sum_chunks, handles, grads, lr, eps, n,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """G += g^2; p -= lr g / (sqrt(G) + eps)."""
    i, live, handle = start(handles, n, ROWS)
    mask = tile_mask(live, WIDTH, PADDED)
    row = tile_of(row_pointers(row_chunks, handle, live, tl.float32, WIDTH, SHIFT), PADDED)
    state = tile_of(row_pointers(sum_chunks, handle, live, tl.float32, WIDTH, SHIFT), PADDED)
    p = tl.load(row, mask=mask, other=0.0)
    g = tl.load(tile_of(grads + i * WIDTH, PADDED), mask=mask, other=0.0)
    total = tl.load(state, mask=mask, other=0.0) + g * g
    tl.store(state, total, mask=mask)
    tl.store(row, p - tl.div_rn(lr * g, tl.sqrt_rn(total) + eps), mask=mask)


@triton.jit(do_not_specialize=["n"])
def rowwise_adagrad_kernel(
    row_chunks, sum_chunks, handles, grads, lr, eps, n,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """G += mean(g^2) over the row, in float64; p -= lr g / (sqrt(G) + eps)."""
    i, live, handle = start(handles, n, ROWS)
    mask = tile_mask(live, WIDTH, PADDED)
    row = tile_of(row_pointers(row_chunks, handle, live, tl.float32, WIDTH, SHIFT), PADDED)
    state = row_pointers(sum_chunks, handle, live, tl.float32, 1, SHIFT)
    p = tl.load(row, mask=mask, other=0.0)
    g = tl.load(tile_of(grads + i * WIDTH, PADDED), mask=mask, other=0.0)
    wide = g.to(tl.float64)
    mean = (tl.sum(wide * wide, axis=1) / WIDTH).to(tl.float32)
    total = tl.load(state, mask=live, other=0.0) + mean
    tl.store(state, total, mask=live)
    tl.store(row, p - tl.div_rn(lr * g, (tl.sqrt_rn(total) + eps)[:, None]), mask=mask)


@triton.jit(do_not_specialize=["n"])
def adam_kernel(
    row_chunks, first_chunks, second_chunks, handles, grads, corrections, weight1, beta2, weight2, eps, decay, n,
    DECAY: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """m += (1-b1)(g-m); v = b2 v + (1-b2) g^2; p -= c1 m / (sqrt(v) / c2 + eps), (c1, c2) = corrections[i].

    weight1 = 1-b1, weight2 = 1-b2. First, with DECAY 1: g += decay p (decay = wd); with 2: p *= decay (1 - lr wd).
    """
    i, live, handle = start(handles, n, ROWS)
    mask = tile_mask(live, WIDTH, PADDED)
    row = tile_of(row_pointers(row_chunks, handle, live, tl.float32, WIDTH, SHIFT), PADDED)
    first = tile_of(row_pointers(first_chunks, handle, live, tl.float32, WIDTH, SHIFT), PADDED)
    second = tile_of(row_pointers(second_chunks, handle, live, tl.float32, WIDTH, SHIFT), PADDED)
    p = tl.load(row, mask=mask, other=0.0)
    m = tl.load(first, mask=mask, other=0.0)
    v = tl.load(second, mask=mask, other=0.0)
    g = tl.load(tile_of(grads + i * WIDTH, PADDED), mask=mask, other=0.0)
    step_size = tl.load(corrections + i * 2, mask=live, other=0.0)[:, None]
    root_correction = tl.load(corrections + i * 2 + 1, mask=live, other=1.0)[:, None]
    if DECAY == 1:
        g += decay * p
    if DECAY == 2:
        p *= decay
    m += weight1 * (g - m)
    v = beta2 * v + weight2 * g * g
    tl.store(first, m, mask=mask)
    tl.store(second, v, mask=mask)
    tl.store(row, p - tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), root_correction) + eps), mask=mask)
