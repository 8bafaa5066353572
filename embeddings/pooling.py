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
        backend: whose functions run where the leaf is.
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
        pooled = backend.pool_rows(leaf, index, bags.offsets, weights)
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
            backend.unpool_rows(grad, index, bags.offsets, weights, leaf.grad)
        of_weights = None
        if ctx.needs_input_grad[1]:
            of_weights = (leaf.detach()[index] * grad[bags.numbers]).sum(1)
        return None, of_weights, None, None, None, None


def _counts(bags: Bags) -> Tensor:
    return bags.lengths.clamp(min=1)[:, None]
