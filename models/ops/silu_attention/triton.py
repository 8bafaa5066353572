"""Silu attention under a visibility mask by Triton kernels: those of hstu_attention, with times instead of biases."""

from typing import Any

import torch
from grzoo.embeddings.kernels.triton.launch import runs_on
from grzoo.models.ops.hstu_attention.tiles import row_tiles
from grzoo.models.ops.hstu_attention.triton_launch import Attention, dense, forward, gradients, launch_for
from grzoo.models.ops.shapes import check_attention_shapes, check_shape
from grzoo.models.packing import JaggedLayout
from torch import Tensor

from .visibility import Visibility


def silu_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    visibility: Visibility,
    *,
    divisors: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """`silu_attention_naive` (formula and shapes there) in tiles; tiles in which nothing is seen are left out.

    Scores and sums are float32; products take the dtype of `value`. The same bits on every run.

    Raises:
        ValueError: for tensors that Triton cannot reach, float64, and sizes that do not fit.
    """
    if not runs_on(query) or query.dtype == torch.float64:
        raise ValueError(
            f"The Triton kernel takes GPU tensors of at most 32 bits, got {query.dtype} on {query.device}: "
            "choose another attn_implementation."
        )
    check_attention_shapes(query, key, value, layout.num_tokens)
    times = {"query_times": visibility.query_times, "key_times": visibility.key_times}
    for name, x in (*times.items(), ("divisors", divisors)):
        check_shape(name, x, (layout.num_tokens,))
    tile = launch_for(query, value).tile
    rows, columns = (row_tiles(layout, tile, by_rows=by_rows) for by_rows in (True, False))
    out: Tensor = _silu_attention(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        layout.cu_seq_lens,
        visibility.query_times,
        visibility.key_times,
        [rows.sequence, rows.block, columns.sequence, columns.block],
        -1 if visibility.max_distance is None else visibility.max_distance,
        scale,
    )
    return (out.float() / divisors.float()[:, None, None]).to(value.dtype)


@torch.library.custom_op("grzoo::silu_attention_triton", mutates_args=())
def _silu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    query_times: Tensor,
    key_times: Tensor,
    tiles: list[Tensor],
    max_distance: int,
    scale: float,
) -> Tensor:
    return forward(query, key, value, _attention(cu_seq_lens, query_times, key_times, tiles, max_distance, scale))


@_silu_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@torch.library.custom_op("grzoo::silu_attention_triton_backward", mutates_args=())
def _silu_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    query_times: Tensor,
    key_times: Tensor,
    tiles: list[Tensor],
    max_distance: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    sources = dense(query), dense(key), dense(value), dense(grad.to(value.dtype))
    return gradients(sources, _attention(cu_seq_lens, query_times, key_times, tiles, max_distance, scale))


@_silu_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _attention(
    cu_seq_lens: Tensor, query_times: Tensor, key_times: Tensor, tiles: list[Tensor], max_distance: int, scale: float
) -> Attention:
    query_times, key_times = query_times.contiguous(), key_times.contiguous()
    return Attention(
        starts=cu_seq_lens,
        rows=(tiles[0], tiles[1]),
        columns=(tiles[2], tiles[3]),
        tables=(query_times, query_times, query_times, key_times, key_times),
        position=False,
        times=1 if max_distance < 0 else 2,
        buckets=0,
        max_length=0,
        max_distance=max_distance,
        scale=scale,
        divisor=1.0,
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.tiles, ctx.max_distance, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    found = _silu_attention_backward(grad, *ctx.saved_tensors, ctx.tiles, ctx.max_distance, ctx.scale)
    return *found, None, None, None, [None] * 4, None, None


_silu_attention.register_autograd(_backward, setup_context=_setup_context)
