"""Sampled softmax by Triton kernels: rows are gathered into registers, there is no [tokens, negatives, dim] tensor."""

from typing import Any

import torch
import triton
from grzoo.embeddings.kernels.triton.launch import on, runs_on
from torch import Tensor

from . import triton_kernels as kernels
from .host import check_shapes
from .naive import l2_normalize


def sampled_softmax_loss_triton(
    query: Tensor,
    rows: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    accidental: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """`sampled_softmax_loss_naive` (formula and shapes there) with negatives of each token, in float32.

    Memory beyond inputs and gradients: 4 bytes a pick for its slope, 16 while picks are sorted by row. Row gradients
    are summed in the order of the tokens: the same bits on every run.

    Raises:
        ValueError: for tensors that Triton cannot reach, float64, shared negatives, or sizes that do not fit.
    """
    if not runs_on(query) or query.dtype == torch.float64 or negative_index.dim() != 2:
        raise ValueError(
            "The Triton kernel takes GPU tensors of at most 32 bits and negatives [T, N]; got "
            f"{query.dtype} on {query.device} and negatives {list(negative_index.shape)}: use sampled_softmax_loss."
        )
    check_shapes(query, rows, positive_index, negative_index, accidental)
    index = torch.cat([positive_index.unsqueeze(1), negative_index], dim=1)
    query, rows = l2_normalize(query.float()), l2_normalize(rows.float())
    loss: Tensor = _sampled_softmax(query, rows, index, accidental.to(torch.uint8), 1 / temperature)[0]
    return loss


def shape_of(width: int, picks: int) -> dict[str, int]:
    """Constants of a launch: blocks of about 2,048 numbers."""
    padded = triton.next_power_of_2(width)
    return {"PICKS": picks, "WIDTH": width, "PADDED": padded, "BLOCK": max(4, min(64, 2048 // padded))}


@torch.library.custom_op("grzoo::sampled_softmax_triton", mutates_args=())
def _sampled_softmax(
    query: Tensor, rows: Tensor, index: Tensor, accidental: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor]:
    """Loss, and the normalisers float32 [T]."""
    tokens, picks = index.shape
    query, rows, index, accidental = (x.contiguous() for x in (query, rows, index, accidental))
    losses, normalisers = (query.new_empty(tokens) for _ in range(2))
    if tokens:
        with on(query.device):
            kernels.token_loss_kernel[(tokens,)](
                query, rows, index, accidental, losses, normalisers, inverse_temperature,
                **shape_of(query.shape[1], picks),
            )  # fmt: skip
    return losses.sum(), normalisers


@_sampled_softmax.register_fake
def _(
    query: Tensor, rows: Tensor, index: Tensor, accidental: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor]:
    return query.new_empty(()), query.new_empty(index.shape[0])


@torch.library.custom_op("grzoo::sampled_softmax_triton_backward", mutates_args=())
def _sampled_softmax_backward(
    query: Tensor, rows: Tensor, index: Tensor, accidental: Tensor, normalisers: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the loss by query and rows."""
    tokens, picks = index.shape
    query, rows, index, accidental = (x.contiguous() for x in (query, rows, index, accidental))
    dquery, drows = torch.empty_like(query), torch.zeros_like(rows)
    if not tokens:
        return dquery, drows
    slopes = query.new_empty(tokens, picks)
    flat = index.flatten()
    order = flat.argsort(stable=True)
    offsets = torch.searchsorted(flat[order], torch.arange(len(rows) + 1, device=flat.device))
    shape = shape_of(query.shape[1], picks)
    with on(query.device):
        kernels.query_gradient_kernel[(tokens,)](
            query, rows, index, accidental, normalisers, slopes, dquery, inverse_temperature, **shape
        )
        kernels.row_gradient_kernel[(len(rows),)](query, slopes, order, offsets, drows, **shape)
    return dquery, drows


@_sampled_softmax_backward.register_fake
def _(query: Tensor, rows: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(rows)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.inverse_temperature = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    dquery, drows = _sampled_softmax_backward(*ctx.saved_tensors, ctx.inverse_temperature)
    return dquery * grad_loss, drows * grad_loss, None, None, None


_sampled_softmax.register_autograd(_backward, setup_context=_setup_context)
