"""Differentiable pooling: one row per bag of ids, from the leaf of a step and back to it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .jagged import Bags
from .kernels import Backend
from .lookup import OnBackward


def pool(leaf: Tensor, index: Tensor, bags: Bags, backend: Backend, on_backward: OnBackward) -> Tensor:
    """Return the pooled rows float32 [*bags.shape, dim] of leaf[index]; zeros for an empty bag.

    Args:
        leaf: float32 [U, dim] of a step; its gradient is added to leaf.grad.
        index: int64 [n], into the leaf.
        bags: cut the n rows, and say how they are pooled; bags.weights get their gradients.
        backend: of the table.
        on_backward: called when a gradient of the leaf arrives.
    """
    pooled: Tensor = PoolRows.apply(leaf, bags.weights, index.reshape(-1), bags, backend, on_backward)
    return pooled.view(*bags.shape, leaf.shape[1])


class PoolRows(torch.autograd.Function):
    """p[b] = sum of w_i leaf[index_i] over bag b, in the order of i; the mean divides by the ids in the bag.

    backward: leaf.grad[index_i] += w_i g[b] in the order of i, w_i.grad = <leaf[index_i], g[b]>.
    """

    @staticmethod
    def forward(
        ctx: Any,
        leaf: Tensor,
        weights: Tensor | None,
        index: Tensor,
        bags: Bags,
        backend: Backend,
        on_backward: OnBackward,
    ) -> Tensor:
        ctx.leaf, ctx.bags, ctx.backend, ctx.on_backward = leaf, bags, backend, on_backward
        ctx.save_for_backward(index, weights)
        on_cpu = leaf.device.type == "cpu"
        pooled = backend.pool_rows(leaf, index, bags.offsets, weights) if on_cpu else pool_on_device(leaf, index, bags)
        return pooled.div_(_counts(bags)) if bags.mean else pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, weights = ctx.saved_tensors
        leaf, bags, backend = ctx.leaf, ctx.bags, ctx.backend
        grad = (grad / _counts(bags) if bags.mean else grad).contiguous()
        if ctx.needs_input_grad[0]:
            ctx.on_backward()
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf, requires_grad=False)
            if leaf.device.type == "cpu":
                backend.unpool_rows(grad, index, bags.offsets, weights, leaf.grad)
            else:
                unpool_on_device(grad, index, bags, leaf.grad)
        of_weights = None
        if ctx.needs_input_grad[1]:
            of_weights = (leaf.detach()[index] * grad[bags.numbers]).sum(1)
        return None, of_weights, None, None, None, None


def pool_on_device(leaf: Tensor, index: Tensor, bags: Bags) -> Tensor:
    """Return the sums float32 [bags, dim] as `Backend.pool_rows`, by torch: deterministic on CUDA too."""
    sums = leaf.new_zeros(len(bags.offsets) - 1, leaf.shape[1])
    return sums.index_put_((bags.numbers,), _weighted(leaf.index_select(0, index), bags.weights), accumulate=True)


def unpool_on_device(grads: Tensor, index: Tensor, bags: Bags, out: Tensor) -> None:
    """Add to `out` as `Backend.unpool_rows`, by torch: deterministic on CUDA too."""
    out.index_put_((index,), _weighted(grads[bags.numbers], bags.weights), accumulate=True)


def _counts(bags: Bags) -> Tensor:
    return bags.lengths.clamp(min=1)[:, None]


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else rows * weights[:, None]
