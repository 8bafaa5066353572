"""HSTU attention by Triton kernels on a GPU (or under Triton's interpreter): no padded work, no atomics."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from grzoo.embeddings.kernels.triton.launch import INTERPRETED, on, runs_on
from grzoo.models.packing import JaggedLayout
from torch import Tensor

from . import triton_kernels as kernels
from .host import bucket_thresholds
from .tiles import diagonal_tiles, row_tiles


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
        ValueError: for tensors that Triton cannot reach, float64, a sequence longer than `max_length`, missing times.
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
    tile = _launch(query, value).tile
    rows, columns = (row_tiles(layout, tile, by_rows=by_rows) for by_rows in (True, False))
    diagonals = diagonal_tiles(layout, tile)
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
        tile,
    )
    return out


def _relative_times(layout: JaggedLayout) -> tuple[Tensor, Tensor]:
    """Timestamps and target timestamps since the earliest one: int32 where that holds them, which halves registers."""
    if layout.timestamps is None or layout.target_timestamps is None:
        raise ValueError("A time table needs timestamps and target_timestamps; give them or leave the time bias out.")
    if "relative_times" not in layout.cache:
        times = torch.stack([layout.timestamps, layout.target_timestamps]).to(torch.int64)
        if times.numel():
            low, high = torch.stack(times.aminmax()).tolist()
            times = (times - low).to(torch.int32) if high - low < 2**31 - 1 else times
        layout.cache["relative_times"] = times[0], times[1]
    relative: tuple[Tensor, Tensor] = layout.cache["relative_times"]
    return relative


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched: rows of a tile, warps of a program, stages of its loads."""

    tile: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def launch_of(key_width: int, value_width: int, dtype: torch.dtype, *, hopper: bool) -> Launch:
    """Return a launch whose tiles fit the registers: `grzoo.models.ops.inspect` tells what the compilers made of it."""
    width = max(padded(key_width), padded(value_width))
    if dtype == torch.float32:
        return Launch(32, 8, 1) if width <= 64 else Launch(16, 4, 1)
    if width <= 64 and hopper:
        return Launch(64, 8, 2)
    return Launch(32, 4, 2) if width <= 128 else Launch(32, 8, 1)


def _launch(query: Tensor, value: Tensor) -> Launch:
    is_nvidia = query.device.type == "cuda" and not torch.version.hip
    hopper = is_nvidia and torch.cuda.get_device_capability(query.device) >= (9, 0)
    return launch_of(query.shape[2], value.shape[2], value.dtype, hopper=hopper)


def padded(width: int) -> int:
    """Width of a row in a tile: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(width))


def precision() -> str:
    """How float32 products are formed: exact up to rounding, on tensor cores where that can be."""
    if INTERPRETED:
        return "interpreted"
    return "ieee" if torch.version.hip else "tf32x3"


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
    tile: int,
) -> Tensor:
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    query, key, value = (_dense(x) for x in (query, key, value))
    tables = _tables(position_table, time_table, timestamps, target_timestamps)
    options = _launch(query, value).options
    if tiles[0].numel():
        with on(query.device):
            kernels.forward_kernel[(tiles[0].numel(), query.shape[1])](
                query, key, value, out, cu_seq_lens, tiles[0], tiles[1], *tables,
                *_strides(query, key, value, out), max_length, 1.0, float(max_length),
                **_constants(query, value, time_table, tile), POSITION=1, TIMES=0, **options,
            )  # fmt: skip
    return out


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
    tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    query, key, value, grad = (_dense(x) for x in (query, key, value, grad.to(value.dtype)))
    tables = _tables(position_table, time_table, timestamps, target_timestamps)
    constants = _constants(query, value, time_table, tile)
    options = _launch(query, value).options
    dquery, dkey, dvalue = gradients
    sources = query, key, value, grad
    if tiles[0].numel():
        with on(query.device):
            kernels.query_gradient_kernel[(tiles[0].numel(), query.shape[1])](
                *sources, dquery, cu_seq_lens, tiles[0], tiles[1], *tables, *_strides(*sources, dquery),
                max_length, 1.0, float(max_length), **constants, POSITION=1, TIMES=0, **options,
            )  # fmt: skip
            kernels.key_value_gradient_kernel[(tiles[2].numel(), query.shape[1])](
                *sources, dkey, dvalue, cu_seq_lens, tiles[2], tiles[3], *tables, *_strides(*sources, dkey, dvalue),
                max_length, 1.0, float(max_length), **constants, POSITION=1, TIMES=0, **options,
            )  # fmt: skip
    dtables = _bias_gradients(sources, cu_seq_lens, tables, time_table, diagonals, max_length, constants)
    return dquery, dkey, dvalue, *dtables


@_hstu_attention_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad, query, key, value, cu_seq_lens, position_table, time_table, *_
) -> tuple[Tensor, ...]:
    made = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, position_table)
    )
    return *made, position_table.new_empty(0) if time_table is None else torch.empty_like(time_table)


def _bias_gradients(
    sources: tuple[Tensor, ...],
    cu_seq_lens: Tensor,
    tables: tuple[Tensor, ...],
    time_table: Tensor | None,
    diagonals: list[Tensor],
    max_length: int,
    constants: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Gradients of the position and the time table; partial sums of segments are added in their order."""
    query, tile = sources[0], constants["TILE"]
    first, sequence, block, distance = diagonals
    position = torch.zeros_like(tables[0])
    time = position.new_zeros(0 if time_table is None else time_table.numel())
    segments = distance.numel()
    if not segments:
        return position, time
    buckets = 16 if time_table is None else padded(time_table.numel())
    position_sums, time_sums = position.new_empty(segments, 2 * tile), position.new_empty(segments, buckets)
    with on(query.device):
        kernels.bias_gradient_kernel[(segments,)](
            *sources, position_sums, time_sums, cu_seq_lens, first, sequence, block, distance, *tables,
            *_strides(*sources), max_length, query.shape[1], 1.0, float(max_length), **constants,
            PADDED_BUCKETS=buckets, **_launch(query, sources[2]).options,
        )  # fmt: skip
    place = torch.arange(2 * tile, device=query.device) + max_length - tile - tile * distance.long().unsqueeze(1)
    inside = (place >= 0) & (place < max_length)  # elsewhere is j > i, or beyond the longest sequence: nothing to add
    position.index_put_((place[inside],), position_sums[inside], accumulate=True)  # sorts: deterministic on a GPU
    return position, time_sums.sum(0)[: time.numel()] if time.numel() else time


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(dimension) for x in tensors for dimension in (0, 1)]


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


def _constants(query: Tensor, value: Tensor, time_table: Tensor | None, tile: int) -> dict[str, Any]:
    return {
        "WIDTH_K": query.shape[2],
        "WIDTH_V": value.shape[2],
        "PADDED_K": padded(query.shape[2]),
        "PADDED_V": padded(value.shape[2]),
        "TILE": tile,
        "BUCKETS": 0 if time_table is None else time_table.numel(),
        "PRECISION": precision(),
    }


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.tiles, ctx.diagonals, ctx.max_length, ctx.tile = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: checkpointing recomputes the layer for the first access and refuses a second
    dquery, dkey, dvalue, dposition, dtime = _hstu_attention_backward(
        grad, *saved, ctx.tiles, ctx.diagonals, ctx.max_length, ctx.tile
    )
    return (
        *(dquery, dkey, dvalue, None, dposition, None if saved[5] is None else dtime),
        *(None, None, [None] * 4, [None] * 4, None, None),
    )


_hstu_attention.register_autograd(_backward, setup_context=_setup_context)
