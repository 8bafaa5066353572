"""Keyed dropout by a Triton kernel: one pass over the tokens, no mask in memory."""

from typing import Any

import torch
import triton
from grzoo.embeddings.kernels.triton.launch import blocks, on, runs_on
from grzoo.models.ops.shapes import check_shape
from torch import Tensor

from . import triton_kernels as kernels
from .row_keys import row_keys


def keyed_dropout_triton(x: Tensor, p: float, token_keys: Tensor, site: int) -> Tensor:
    """`keyed_dropout_naive` (formula and shapes there), the same mask bit for bit.

    Raises:
        ValueError: for tensors that Triton cannot reach, and float64.
    """
    if not runs_on(x) or x.dtype == torch.float64:
        raise ValueError(
            f"The Triton kernel takes GPU tensors of at most 32 bits, got {x.dtype} on {x.device}: use keyed_dropout."
        )
    out: Tensor = _keyed_dropout(x, row_keys(token_keys, site), p)
    return out


def shape_of(width: int) -> dict[str, int]:
    """Constants of a launch: about 2,048 numbers a program, whole rows."""
    padded = triton.next_power_of_2(width)
    return {"WIDTH": width, "PADDED": padded, "ROWS": max(1, 2048 // padded)}


def threshold(p: float) -> tuple[int, float]:
    """The least of 24 bits that is kept, and what a number that is kept is multiplied by."""
    return round(p * 2**24), 1 / (1 - p)


def dense_rows(x: Tensor) -> Tensor:
    """Return x [T, C] with the numbers of a row one behind the other."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


@torch.library.custom_op("grzoo::keyed_dropout_triton", mutates_args=())
def _keyed_dropout(x: Tensor, row_keys: Tensor, p: float) -> Tensor:
    check_shape("token_keys", row_keys, x.shape[:1])
    x = dense_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        shape = shape_of(x.shape[1])
        with on(x.device):
            kernels.keyed_dropout_kernel[blocks(len(x), shape["ROWS"])](
                x, out, row_keys.contiguous(), len(x), x.stride(0), *threshold(p), **shape
            )
    return out


@_keyed_dropout.register_fake
def _(x: Tensor, row_keys: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, row_keys, ctx.p = inputs
    ctx.save_for_backward(row_keys)


def _backward(ctx, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    return _keyed_dropout(grad, *ctx.saved_tensors, ctx.p), None, None


_keyed_dropout.register_autograd(_backward, setup_context=_setup_context)
