"""LayerNorm, gate and keyed dropout by Triton kernels: two launches a layer, nothing kept but the inputs."""

from typing import Any

import torch
from grzoo.embeddings.kernels.triton.launch import blocks, on, runs_on
from grzoo.models.ops.keyed_dropout.row_keys import row_keys
from grzoo.models.ops.keyed_dropout.triton import dense_rows, shape_of, threshold
from torch import Tensor

from . import triton_kernels as kernels
from .host import check_shapes


def norm_gate_dropout_triton(
    x: Tensor, gate: Tensor, *, eps: float, p: float = 0.0, token_keys: Tensor | None = None, site: int = 0
) -> Tensor:
    """`norm_gate_dropout_naive` (formula and shapes there) in float32 sums, the same mask bit for bit.

    Raises:
        ValueError: for tensors that Triton cannot reach, and float64.
    """
    if not runs_on(x) or x.dtype == torch.float64:
        raise ValueError(
            f"The Triton kernel takes GPU tensors of at most 32 bits, got {x.dtype} on {x.device}: "
            "use norm_gate_dropout."
        )
    keys = None if token_keys is None else row_keys(token_keys, site)
    out: Tensor = _norm_gate_dropout(x, gate.to(x.dtype), keys, eps, p)
    return out


@torch.library.custom_op("grzoo::norm_gate_dropout_triton", mutates_args=())
def _norm_gate_dropout(x: Tensor, gate: Tensor, row_keys: Tensor | None, eps: float, p: float) -> Tensor:
    check_shapes(x, gate, None, row_keys)
    x, gate = dense_rows(x), dense_rows(gate)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = shape_of(x.shape[1])
    if out.numel():
        with on(x.device):
            kernels.norm_gate_forward_kernel[blocks(len(x), shape["ROWS"])](
                x, gate, out, x if row_keys is None else row_keys, len(x), x.stride(0), gate.stride(0), eps,
                *threshold(p), **shape, DROPOUT=int(row_keys is not None),
            )  # fmt: skip
    return out


@_norm_gate_dropout.register_fake
def _(x: Tensor, gate: Tensor, row_keys: Tensor | None, eps: float, p: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("grzoo::norm_gate_dropout_triton_backward", mutates_args=())
def _norm_gate_dropout_backward(
    grad: Tensor, x: Tensor, gate: Tensor, row_keys: Tensor | None, eps: float, p: float
) -> tuple[Tensor, Tensor]:
    check_shapes(x, gate, grad, row_keys)
    x, gate, grad = dense_rows(x), dense_rows(gate), dense_rows(grad)
    dx, dgate = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    shape = shape_of(x.shape[1])
    if dx.numel():
        with on(x.device):
            kernels.norm_gate_backward_kernel[blocks(len(x), shape["ROWS"])](
                x, gate, grad, dx, dgate, x if row_keys is None else row_keys, len(x), x.stride(0), gate.stride(0),
                grad.stride(0), eps, *threshold(p), **shape, DROPOUT=int(row_keys is not None),
            )  # fmt: skip
    return dx, dgate


@_norm_gate_dropout_backward.register_fake
def _(grad: Tensor, x: Tensor, gate: Tensor, row_keys: Tensor | None, eps: float, p: float) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.eps, ctx.p = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    dx, dgate = _norm_gate_dropout_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.p)
    return dx, dgate, None, None, None


_norm_gate_dropout.register_autograd(_backward, setup_context=_setup_context)
