# mypy: ignore-errors
"""Kernels of silu attention over packed sequences; one program does one tile of rows (or columns) of one head.

Suffixes: R rows (queries) of a tile, C columns (keys), K width of query and key, V width of value. Scores are float32
and recomputed in each kernel; products take the dtype of `value`; every sum has a fixed order.

Who sees whom is causal (TIMES 0), or by the two times of a token (TIMES 1): `key_time[j] < query_time[i]`, and itself;
with TIMES 2 not farther than `max_distance` either (see silu_attention.Visibility).
"""

import triton
import triton.language as tl


@triton.jit
def bucket_of(query_times, key_times, thresholds, BUCKETS: tl.constexpr):
    """Return the bucket of |query - key|: a guess by the float32 logarithm, set right by the exact thresholds.

    thresholds int64 [BUCKETS - 1]: the least difference of bucket 1, 2, ...
    """
    difference = query_times - key_times
    difference = tl.where(difference < 0, -difference, difference)
    guess = (tl.log(tl.maximum(difference.to(tl.float32), 1.0)) / 0.301).to(tl.int32)  # bias.TIME_BUCKET_WIDTH
    guess = tl.minimum(guess, BUCKETS - 1)
    above = tl.load(thresholds + tl.maximum(tl.minimum(guess, BUCKETS - 2), 0))
    below = tl.load(thresholds + tl.maximum(guess - 1, 0))
    up = (guess < BUCKETS - 1) & (difference >= above)
    down = (guess > 0) & (difference < below)
    return guess + up.to(tl.int32) - down.to(tl.int32)


@triton.jit
def load_rows(base, places, valid, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Return [n, PADDED] of rows that lie `stride` apart; zeros where not valid and beyond the width."""
    columns = tl.arange(0, PADDED)
    mask = valid[:, None]
    if WIDTH < PADDED:
        mask = mask & (columns[None, :] < WIDTH)
    return tl.load(base + places[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, places, valid, stride, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    mask = valid[:, None]
    if WIDTH < PADDED:
        mask = mask & (columns[None, :] < WIDTH)
    tl.store(base + places[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def bias_of(
    i, j, length, start, position_table, time_table, query_times, key_times, thresholds, valid, max_length,
    POSITION: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Return the bias [R, C] of rows i and columns j of the sequence that begins at `start`, and its time buckets."""
    bias = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    buckets = tl.zeros([i.shape[0], j.shape[0]], tl.int32)
    if POSITION:
        bias += tl.load(position_table + (max_length - 1 + j[None, :] - i[:, None]), mask=valid, other=0.0)
    if BUCKETS > 0:
        # One number a row and a column: under a mask of the tile, each pair would load its own.
        at_i = tl.load(query_times + start + i[:, None], mask=i[:, None] < length, other=0)
        at_j = tl.load(key_times + start + j[None, :], mask=j[None, :] < length, other=0)
        buckets = bucket_of(at_i, at_j, thresholds, BUCKETS)
        bias += tl.load(time_table + buckets, mask=valid, other=0.0)
    return bias, buckets


@triton.jit
def visible(i, j, length, start, query_times, key_times, max_distance, TIMES: tl.constexpr):
    """Return bool [R, C]: whether row i sees column j."""
    inside = (i[:, None] < length) & (j[None, :] < length)
    if TIMES > 0:
        at_i = tl.load(query_times + start + i[:, None], mask=i[:, None] < length, other=0)
        at_j = tl.load(key_times + start + j[None, :], mask=j[None, :] < length, other=0)
        seen = at_j < at_i
        if TIMES == 2:
            seen = seen & ((at_i - at_j <= max_distance) | (at_j == -(1 << 62)))  # visibility.ALWAYS
        return inside & (seen | (i[:, None] == j[None, :]))
    return inside & (j[None, :] <= i[:, None])


@triton.jit
def any_of(seen):
    """Whether a tile has a pair at all."""
    return tl.max(tl.max(seen.to(tl.int32), 1), 0)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    if PRECISION == "interpreted":  # whose products take the bits of bfloat16 for whole numbers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def forward_kernel(
    query, key, value, out, starts, tile_sequence, tile_block, position_table, time_table, query_times, key_times,
    thresholds, query_token, query_head, key_token, key_head, value_token, value_head, out_token, out_head,
    max_length, max_distance, scale, divisor,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    TILE: tl.constexpr, POSITION: tl.constexpr, BUCKETS: tl.constexpr,
    TIMES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = sum over j seen by i of silu(scale q_i . k_j + bias_ij) v_j / divisor, for one tile of rows."""
    sequence = tl.load(tile_sequence + tl.program_id(0))
    first = tl.load(tile_block + tl.program_id(0)) * TILE
    head = tl.program_id(1)
    start = tl.load(starts + sequence)
    length = (tl.load(starts + sequence + 1) - start).to(tl.int32)
    i = first + tl.arange(0, TILE)
    q_RK = load_rows(query + head * query_head, start + i, i < length, query_token, WIDTH_K, PADDED_K)
    out_RV = tl.zeros([TILE, PADDED_V], tl.float32)
    end = length
    if TIMES == 0:
        end = tl.minimum(length, first + TILE)
    for column in range(0, end, TILE):
        j = column + tl.arange(0, TILE)
        seen = visible(i, j, length, start, query_times, key_times, max_distance, TIMES)
        found = 1
        if TIMES > 0:  # a causal tile always has pairs
            found = any_of(seen)
        if found > 0:
            k_CK = load_rows(key + head * key_head, start + j, j < length, key_token, WIDTH_K, PADDED_K)
            v_CV = load_rows(value + head * value_head, start + j, j < length, value_token, WIDTH_V, PADDED_V)
            bias, _ = bias_of(
                i, j, length, start, position_table, time_table, query_times, key_times, thresholds, seen, max_length,
                POSITION, BUCKETS,
            )  # fmt: skip
            s_RC = product(q_RK, tl.trans(k_CK), PRECISION) * scale + bias
            w_RC = tl.where(seen, s_RC * tl.sigmoid(s_RC), 0.0)
            out_RV += product(w_RC.to(v_CV.dtype), v_CV, PRECISION)
    store_rows(out + head * out_head, start + i, i < length, out_token, out_RV / divisor, WIDTH_V, PADDED_V)


@triton.jit
def slopes(q_RK, k_CK, v_CV, g_RV, bias, seen, scale, PRECISION: tl.constexpr):
    """Return the weights silu(s) and dL/ds, both [R, C] and 0 where not seen."""
    s_RC = product(q_RK, tl.trans(k_CK), PRECISION) * scale + bias
    gate = tl.sigmoid(s_RC)
    dw_RC = product(g_RV, tl.trans(v_CV), PRECISION)
    ds_RC = tl.where(seen, dw_RC * gate * (1.0 + s_RC * (1.0 - gate)), 0.0)
    return tl.where(seen, s_RC * gate, 0.0), ds_RC


@triton.jit
def query_gradient_kernel(
    query, key, value, grad, dquery, starts, tile_sequence, tile_block, position_table, time_table, query_times,
    key_times, thresholds, query_token, query_head, key_token, key_head, value_token, value_head, grad_token,
    grad_head, dquery_token, dquery_head, max_length, max_distance, scale, divisor,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    TILE: tl.constexpr, POSITION: tl.constexpr, BUCKETS: tl.constexpr,
    TIMES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_i = scale sum_j ds_ij k_j, for one tile of rows."""
    sequence = tl.load(tile_sequence + tl.program_id(0))
    first = tl.load(tile_block + tl.program_id(0)) * TILE
    head = tl.program_id(1)
    start = tl.load(starts + sequence)
    length = (tl.load(starts + sequence + 1) - start).to(tl.int32)
    i = first + tl.arange(0, TILE)
    q_RK = load_rows(query + head * query_head, start + i, i < length, query_token, WIDTH_K, PADDED_K)
    g_RV = load_rows(grad + head * grad_head, start + i, i < length, grad_token, WIDTH_V, PADDED_V)
    dq_RK = tl.zeros([TILE, PADDED_K], tl.float32)
    end = length
    if TIMES == 0:
        end = tl.minimum(length, first + TILE)
    for column in range(0, end, TILE):
        j = column + tl.arange(0, TILE)
        seen = visible(i, j, length, start, query_times, key_times, max_distance, TIMES)
        found = 1
        if TIMES > 0:  # a causal tile always has pairs
            found = any_of(seen)
        if found > 0:
            k_CK = load_rows(key + head * key_head, start + j, j < length, key_token, WIDTH_K, PADDED_K)
            v_CV = load_rows(value + head * value_head, start + j, j < length, value_token, WIDTH_V, PADDED_V)
            bias, _ = bias_of(
                i, j, length, start, position_table, time_table, query_times, key_times, thresholds, seen, max_length,
                POSITION, BUCKETS,
            )  # fmt: skip
            _, ds_RC = slopes(q_RK, k_CK, v_CV, g_RV, bias, seen, scale, PRECISION)
            dq_RK += product(ds_RC.to(k_CK.dtype), k_CK, PRECISION)
    dq_RK *= scale / divisor
    store_rows(dquery + head * dquery_head, start + i, i < length, dquery_token, dq_RK, WIDTH_K, PADDED_K)


@triton.jit
def key_value_gradient_kernel(
    query, key, value, grad, dkey, dvalue, starts, tile_sequence, tile_block, position_table, time_table, query_times,
    key_times, thresholds, query_token, query_head, key_token, key_head, value_token, value_head, grad_token,
    grad_head, dkey_token, dkey_head, dvalue_token, dvalue_head, max_length, max_distance, scale, divisor,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    TILE: tl.constexpr, POSITION: tl.constexpr, BUCKETS: tl.constexpr,
    TIMES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk_j = scale sum_i ds_ij q_i and dv_j = sum_i w_ij g_i, for one tile of columns."""
    sequence = tl.load(tile_sequence + tl.program_id(0))
    first = tl.load(tile_block + tl.program_id(0)) * TILE
    head = tl.program_id(1)
    start = tl.load(starts + sequence)
    length = (tl.load(starts + sequence + 1) - start).to(tl.int32)
    j = first + tl.arange(0, TILE)
    k_CK = load_rows(key + head * key_head, start + j, j < length, key_token, WIDTH_K, PADDED_K)
    v_CV = load_rows(value + head * value_head, start + j, j < length, value_token, WIDTH_V, PADDED_V)
    dk_CK = tl.zeros([TILE, PADDED_K], tl.float32)
    dv_CV = tl.zeros([TILE, PADDED_V], tl.float32)
    begin = 0
    if TIMES == 0:
        begin = first
    for row in range(begin, length, TILE):
        i = row + tl.arange(0, TILE)
        seen = visible(i, j, length, start, query_times, key_times, max_distance, TIMES)
        found = 1
        if TIMES > 0:  # a causal tile always has pairs
            found = any_of(seen)
        if found > 0:
            q_RK = load_rows(query + head * query_head, start + i, i < length, query_token, WIDTH_K, PADDED_K)
            g_RV = load_rows(grad + head * grad_head, start + i, i < length, grad_token, WIDTH_V, PADDED_V)
            bias, _ = bias_of(
                i, j, length, start, position_table, time_table, query_times, key_times, thresholds, seen, max_length,
                POSITION, BUCKETS,
            )  # fmt: skip
            w_RC, ds_RC = slopes(q_RK, k_CK, v_CV, g_RV, bias, seen, scale, PRECISION)
            dk_CK += product(tl.trans(ds_RC.to(q_RK.dtype)), q_RK, PRECISION)
            dv_CV += product(tl.trans(w_RC.to(g_RV.dtype)), g_RV, PRECISION)
    dk_CK *= scale / divisor
    store_rows(dkey + head * dkey_head, start + j, j < length, dkey_token, dk_CK, WIDTH_K, PADDED_K)
    store_rows(dvalue + head * dvalue_head, start + j, j < length, dvalue_token, dv_CV / divisor, WIDTH_V, PADDED_V)


@triton.jit
def bias_gradient_kernel(
    query, key, value, grad, position_sums, time_sums, starts, segment_tile, tile_sequence, tile_block,
    segment_distance, position_table, time_table, query_times, key_times, thresholds, query_token, query_head,
    key_token, key_head, value_token, value_head, grad_token, grad_head, max_length, heads, scale, divisor,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    TILE: tl.constexpr, BUCKETS: tl.constexpr,
    PADDED_BUCKETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of ds over diagonals and over time buckets, of the tiles of one segment and all heads.

    The tiles of a segment lie equally far below the diagonal (distance, in tiles), so that the sums of a diagonal of a
    tile always go to the same place: position_sums float32 [segments, 2 TILE], place c for j - i = c - (TILE - 1) -
    TILE * distance. time_sums float32 [segments, PADDED_BUCKETS].
    """
    segment = tl.program_id(0)
    distance = tl.load(segment_distance + segment)
    r = tl.arange(0, TILE)
    c = tl.arange(0, 2 * TILE)
    place = c[None, :] + r[:, None] - (TILE - 1)  # column of a tile that lies on diagonal c in row r
    on_tile = (place >= 0) & (place < TILE)
    place = tl.minimum(tl.maximum(place, 0), TILE - 1)
    bucket_numbers = tl.arange(0, PADDED_BUCKETS)
    by_position = tl.zeros([2 * TILE], tl.float32)
    by_bucket = tl.zeros([PADDED_BUCKETS], tl.float32)
    for tile in range(tl.load(segment_tile + segment), tl.load(segment_tile + segment + 1)):
        sequence = tl.load(tile_sequence + tile)
        row = tl.load(tile_block + tile) * TILE
        start = tl.load(starts + sequence)
        length = (tl.load(starts + sequence + 1) - start).to(tl.int32)
        i = row + r
        j = row - distance * TILE + tl.arange(0, TILE)
        seen = visible(i, j, length, start, query_times, key_times, 0, 0)
        bias, buckets = bias_of(
            i, j, length, start, position_table, time_table, query_times, key_times, thresholds, seen, max_length, 1,
            BUCKETS,
        )  # fmt: skip
        sum_RC = tl.zeros([TILE, TILE], tl.float32)
        for head in range(0, heads):
            q_RK = load_rows(query + head * query_head, start + i, i < length, query_token, WIDTH_K, PADDED_K)
            g_RV = load_rows(grad + head * grad_head, start + i, i < length, grad_token, WIDTH_V, PADDED_V)
            k_CK = load_rows(key + head * key_head, start + j, j < length, key_token, WIDTH_K, PADDED_K)
            v_CV = load_rows(value + head * value_head, start + j, j < length, value_token, WIDTH_V, PADDED_V)
            _, ds_RC = slopes(q_RK, k_CK, v_CV, g_RV, bias, seen, scale, PRECISION)
            sum_RC += ds_RC
        by_position += tl.sum(tl.where(on_tile, tl.gather(sum_RC, place, 1), 0.0), 0)
        if BUCKETS > 0:
            low = tl.min(tl.where(seen, buckets, BUCKETS))
            high = tl.max(tl.where(seen, buckets, -1))
            for bucket in range(low, high + 1):
                total = tl.sum(tl.sum(tl.where(seen & (buckets == bucket), sum_RC, 0.0), 1), 0)
                by_bucket += tl.where(bucket_numbers == bucket, total, 0.0)
    tl.store(position_sums + segment * 2 * TILE + c, by_position / divisor)
    if BUCKETS > 0:
        tl.store(time_sums + segment * PADDED_BUCKETS + bucket_numbers, by_bucket / divisor)
