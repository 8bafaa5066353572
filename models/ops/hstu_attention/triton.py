"""HSTU attention by Triton kernels on a GPU (or under Triton's interpreter): no padded work, no atomics."""

from functools import cache
from typing import Any

import torch
from grzoo.embeddings.kernels.triton.launch import on, runs_on
from grzoo.models.ops.shapes import check_attention_shapes, check_shape
from grzoo.models.packing import JaggedLayout
from torch import Tensor

from . import triton_kernels as kernels
from .host import bucket_thresholds
from .tiles import DiagonalTiles, diagonal_tiles, row_tiles
from .triton_launch import Attention, dense, forward, gradients, launch_for, padded, strides


def hstu_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    *,
    max_length: int,
    position_table: Tensor,
    time_table: Tensor | None = None,
) -> Tensor:
    """`hstu_attention_naive` (formula and shapes there) in tiles, the same bits on every run.

    Scores, bias and sums are float32; products take the dtype of `value` (float32 as three TF32 products on NVIDIA).
    Buckets are those of `time_buckets` for times below 2^62.

    Raises:
        ValueError: for tensors that Triton cannot reach, float64, a sequence longer than `max_length`, missing times,
            sizes that do not fit.
    """
    if not runs_on(query) or query.dtype == torch.float64:
        raise ValueError(
            f"The Triton kernel takes GPU tensors of at most 32 bits, got {query.dtype} on {query.device}: "
            "choose another attn_implementation."
        )
    if layout.max_length > max_length:
        raise ValueError(
            f"A sequence has {layout.max_length} tokens, but max_length is {max_length}: "
            "truncate it or raise max_length."
        )
    times = (None, None) if time_table is None else _relative_times(layout)
    check_attention_shapes(query, key, value, layout.num_tokens)
    check_shape("position_table", position_table, (2 * max_length - 1,))
    tile = launch_for(query, value).tile
    rows, columns = (row_tiles(layout, tile, by_rows=by_rows) for by_rows in (True, False))
    diagonals = diagonal_tiles(layout, tile) if torch.is_grad_enabled() else DiagonalTiles(*[value.new_empty(0)] * 4)
    out: Tensor = _hstu_attention(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        layout.cu_seq_lens,
        position_table.float(),
        None if time_table is None else time_table.float(),
        *times,
        [rows.sequence, rows.block, columns.sequence, columns.block],
        [diagonals.first, diagonals.sequence, diagonals.block, diagonals.distance],
        max_length,
    )
    return out


def _relative_times(layout: JaggedLayout) -> tuple[Tensor, Tensor]:
    """Timestamps and target timestamps since the earliest one: int32 where that holds them, which halves registers."""
    if layout.timestamps is None or layout.target_timestamps is None:
        raise ValueError("A time table needs timestamps and target_timestamps; give them or leave the time bias out.")
    if "relative_times" not in layout.cache:
        check_shape("timestamps", layout.timestamps, (layout.num_tokens,))
        times = torch.stack([layout.timestamps, layout.target_timestamps]).to(torch.int64)
        if times.numel():
            low, high = torch.stack(times.aminmax()).tolist()
            times = (times - low).to(torch.int32) if high - low < 2**31 - 1 else times
        # Each in memory of its own: kernels are compiled anew for a tensor that is aligned otherwise.
        layout.cache["relative_times"] = times[0].clone(), times[1].clone()
    relative: tuple[Tensor, Tensor] = layout.cache["relative_times"]
    return relative


@torch.library.custom_op("grzoo::hstu_attention_triton", mutates_args=())
def _hstu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    position_table: Tensor,
    time_table: Tensor | None,
    timestamps: Tensor | None,
    target_timestamps: Tensor | None,
    tiles: list[Tensor],
    diagonals: list[Tensor],
    max_length: int,
) -> Tensor:
    tables = _tables(position_table, time_table, timestamps, target_timestamps)
    return forward(query, key, value, _attention(cu_seq_lens, tables, time_table, tiles, max_length))


@_hstu_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@torch.library.custom_op("grzoo::hstu_attention_triton_backward", mutates_args=())
def _hstu_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    position_table: Tensor,
    time_table: Tensor | None,
    timestamps: Tensor | None,
    target_timestamps: Tensor | None,
    tiles: list[Tensor],
    diagonals: list[Tensor],
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sources = dense(query), dense(key), dense(value), dense(grad.to(value.dtype))
    tables = _tables(position_table, time_table, timestamps, target_timestamps)
    attention = _attention(cu_seq_lens, tables, time_table, tiles, max_length)
    return *gradients(sources, attention), *_bias_gradients(sources, attention, time_table, diagonals)


@_hstu_attention_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad, query, key, value, cu_seq_lens, position_table, time_table, *_
) -> tuple[Tensor, ...]:
    made = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, position_table)
    )
    return *made, position_table.new_empty(0) if time_table is None else torch.empty_like(time_table)


def _attention(
    cu_seq_lens: Tensor, tables: tuple[Tensor, ...], time_table: Tensor | None, tiles: list[Tensor], max_length: int
) -> Attention:
    return Attention(
        starts=cu_seq_lens,
        rows=(tiles[0], tiles[1]),
        columns=(tiles[2], tiles[3]),
        tables=tables,
        position=True,
        times=0,
        buckets=0 if time_table is None else time_table.numel(),
        max_length=max_length,
        max_distance=0,
        scale=1.0,
        divisor=float(max_length),
    )


def _bias_gradients(
    sources: tuple[Tensor, ...], attention: Attention, time_table: Tensor | None, diagonals: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of the position and the time table; partial sums of segments are added in their order."""
    query, _, value, _ = sources
    constants, max_length = attention.constants(query, value), attention.max_length
    tile = constants["TILE"]
    first, sequence, block, distance = diagonals
    position = torch.zeros_like(attention.tables[0])
    time = position.new_zeros(attention.buckets)
    segments = distance.numel()
    if not segments:
        return position, time
    buckets = 16 if time_table is None else padded(time_table.numel())
    position_sums, time_sums = position.new_empty(segments, 2 * tile), position.new_empty(segments, buckets)
    with on(query.device):
        kernels.bias_gradient_kernel[(segments,)](
            *sources, position_sums, time_sums, attention.starts, first, sequence, block, distance, *attention.tables,
            *strides(*sources), max_length, query.shape[1], attention.scale, attention.divisor, **constants,
            PADDED_BUCKETS=buckets,
        )  # fmt: skip
    place = torch.arange(2 * tile, device=query.device) + max_length - tile - tile * distance.long().unsqueeze(1)
    place.clamp_(0, position.numel() - 1)  # beyond lies j > i, or more than the longest sequence: the sums there are 0
    position.index_put_((place,), position_sums, accumulate=True)  # sorts: deterministic on a GPU
    return position, time_sums.sum(0)[: time.numel()] if time.numel() else time


def _tables(
    position_table: Tensor, time_table: Tensor | None, timestamps: Tensor | None, target_timestamps: Tensor | None
) -> tuple[Tensor, ...]:
    """Position table, time table, query times, key times, thresholds; where there is no time bias they are not read."""
    position = position_table.contiguous()
    if time_table is None:
        return position, position, position, position, position
    assert timestamps is not None and target_timestamps is not None
    thresholds = _thresholds(time_table.numel(), timestamps.dtype, position.device)
    return position, time_table.contiguous(), target_timestamps.contiguous(), timestamps.contiguous(), thresholds


@cache
def _thresholds(num_buckets: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`bucket_thresholds` in the type of the times, never empty; what int32 cannot hold is out of reach there."""
    thresholds = torch.nn.functional.pad(bucket_thresholds(num_buckets), (0, 1))
    return thresholds.clamp(max=torch.iinfo(dtype).max).to(device, dtype)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.tiles, ctx.diagonals, ctx.max_length = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: checkpointing recomputes the layer for the first access and refuses a second
    dquery, dkey, dvalue, dposition, dtime = _hstu_attention_backward(
        grad, *saved, ctx.tiles, ctx.diagonals, ctx.max_length
    )
    return (
        *(dquery, dkey, dvalue, None, dposition, None if saved[5] is None else dtime),
        *(None, None, [None] * 4, [None] * 4, None),
    )


_hstu_attention.register_autograd(_backward, setup_context=_setup_context)
