# mypy: ignore-errors
"""Kernels of the sampled softmax: a program does one token (loss, query gradient) or one row (row gradient).

`index` int64 [T, N]: rows of a token, its positive first. `accidental` [T, N - 1]: negatives that are the positive.
"""

import triton
import triton.language as tl


@triton.jit
def logits_of(query_D, rows, index, accidental, token, first, columns, inside, inverse_temperature,
              PICKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Return the rows [BLOCK, D] of picks `first`, first + 1, ... of a token, their logits, and which take part."""
    picks = first + tl.arange(0, BLOCK)
    valid = picks < PICKS
    places = tl.load(index + token * PICKS + picks, mask=valid, other=0)
    rows_BD = tl.load(
        rows + places[:, None] * WIDTH + columns[None, :], mask=valid[:, None] & inside[None, :], other=0.0
    )
    negatives = valid & (picks > 0)
    hit = tl.load(accidental + token * (PICKS - 1) + picks - 1, mask=negatives, other=0)
    logits = tl.sum(rows_BD * query_D[None, :], 1) * inverse_temperature
    logits = tl.where(hit != 0, -5e4, logits)  # naive.MASKED_LOGIT
    return rows_BD, tl.where(valid, logits, float("-inf")), valid & (hit == 0)


@triton.jit
def token_loss_kernel(
    query, rows, index, accidental, losses, normalisers, inverse_temperature,
    PICKS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses[t] = logsumexp(logits of t) - logit of its positive; normalisers[t]: the logsumexp."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    query_D = tl.load(query + token * WIDTH + columns, mask=inside, other=0.0)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    positive = tl.zeros([], tl.float32)
    for first in range(0, PICKS, BLOCK):
        _, logits, _ = logits_of(
            query_D, rows, index, accidental, token, first, columns, inside, inverse_temperature, PICKS, WIDTH, BLOCK
        )
        new_highest = tl.maximum(highest, tl.max(logits, 0))
        total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(logits - new_highest), 0)
        highest = new_highest
        positive += tl.sum(tl.where(first + tl.arange(0, BLOCK) == 0, logits, 0.0), 0)
    normaliser = highest + tl.log(total)
    tl.store(normalisers + token, normaliser)
    tl.store(losses + token, normaliser - positive)


@triton.jit
def query_gradient_kernel(
    query, rows, index, accidental, normalisers, slopes, dquery, inverse_temperature,
    PICKS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """slopes[t, n] = dL/d(q_t . r_n) and dquery[t] = sum_n slopes[t, n] r_n."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    query_D = tl.load(query + token * WIDTH + columns, mask=inside, other=0.0)
    normaliser = tl.load(normalisers + token)
    dquery_D = tl.zeros([PADDED], tl.float32)
    for first in range(0, PICKS, BLOCK):
        picks = first + tl.arange(0, BLOCK)
        rows_BD, logits, moves = logits_of(
            query_D, rows, index, accidental, token, first, columns, inside, inverse_temperature, PICKS, WIDTH, BLOCK
        )
        slope = tl.exp(logits - normaliser) - tl.where(picks == 0, 1.0, 0.0)
        slope = tl.where(moves, slope, 0.0) * inverse_temperature
        tl.store(slopes + token * PICKS + picks, slope, mask=picks < PICKS)
        dquery_D += tl.sum(slope[:, None] * rows_BD, 0)
    tl.store(dquery + token * WIDTH + columns, dquery_D, mask=inside)


@triton.jit
def row_gradient_kernel(
    query, slopes, order, offsets, drows,
    PICKS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """drows[u] = sum of slopes[e] q[e // PICKS] over the picks e of row u, in the order of the tokens."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    drow_D = tl.zeros([PADDED], tl.float32)
    end = tl.load(offsets + row + 1)
    for first in range(tl.load(offsets + row), end, BLOCK):
        places = first + tl.arange(0, BLOCK)
        valid = places < end
        picks = tl.load(order + places, mask=valid, other=0)
        slope = tl.load(slopes + picks, mask=valid, other=0.0)
        mask = valid[:, None] & inside[None, :]
        queries = tl.load(query + (picks // PICKS)[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
        drow_D += tl.sum(slope[:, None] * queries, 0)
    tl.store(drows + row * WIDTH + columns, drow_D, mask=inside)
