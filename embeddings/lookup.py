"""Differentiable access to the leaf of a step: the sparse gradients of all micro-batches meet in `leaf.grad`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import Backend

OnBackward = Callable[[], None]


class TakeRows(torch.autograd.Function):
    """rows = leaf[index]; backward adds the gradients of a row's occurrences to leaf.grad, in the order of `index`.

    It adds in place and hands autograd nothing for the leaf: a dense gradient [U, dim] of each use would cost as much
    as the whole step's table for every feature of every micro-batch.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, index: Tensor, backend: Backend, on_backward: OnBackward) -> Tensor:
        ctx.leaf, ctx.backend, ctx.on_backward = leaf, backend, on_backward
        ctx.save_for_backward(index)
        rows = backend.take_rows(leaf, index.reshape(-1))
        return rows.view(*index.shape, leaf.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        ctx.on_backward()
        (index,) = ctx.saved_tensors
        leaf, flat, rows = ctx.leaf, index.reshape(-1), grad.reshape(-1, ctx.leaf.shape[1])
        leaf.grad = ctx.backend.segment_sum(rows.contiguous(), flat.contiguous(), len(leaf), out=leaf.grad)
        return None, None, None, None


class TapLeaf(torch.autograd.Function):
    """The leaf itself, for kernels that gather by themselves; backward only reports that it happened."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, on_backward: OnBackward) -> Tensor:
        ctx.on_backward = on_backward
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.on_backward()
        return grad, None
