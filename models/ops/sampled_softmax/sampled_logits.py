"""Inner products of each query with its own sample of rows, by the cheapest of three ways."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = {"cpu": 1 << 18}
_DEVICE_CHUNK_ELEMENTS = 1 << 26
# A product with all U rows costs less than picking N of them up to U = ratio * N. Measured on one core: T = 4096, N =
# 129, D = 50, forward and backward: picking 30-45 ms, all rows 34 / 64 / 132 ms at U = 512 / 1024 / 2048.
_ALL_ROWS_RATIO = {"cpu": 4}
_DEVICE_ALL_ROWS_RATIO = 16

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.compiler.disable  # its loop over pieces, written into buffers, cannot be traced
def sampled_logits(query: Tensor, rows: Tensor, index: Tensor, *, method: str | None = None) -> Tensor:
    """`sampled_logits_naive` (formula and shapes there) without a [T, N, D] tensor; deterministic.

    Args:
        method: "all_rows" multiplies with all U rows and picks, in chunks of tokens; "picked" works on the picked
            rows only (sparse kernels of torch on a CPU, chunks of gathered rows elsewhere); None chooses by U / N.
    """
    unique, picks = rows.shape[0], index.shape[1]
    if method is None:
        ratio = _ALL_ROWS_RATIO.get(query.device.type, _DEVICE_ALL_ROWS_RATIO)
        method = "all_rows" if unique <= ratio * picks else "picked"
    if unique < picks:
        method = "all_rows"  # picking would cost more, and sampled_addmm refuses it
    if index.numel() == 0 or query.shape[1] == 0:
        return torch.mm(query, rows.new_zeros(picks, rows.shape[1]).T) + rows.sum() * 0
    out: Tensor = _SampledLogits.apply(query, rows, index, method)
    return out


class _SampledLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, rows: Tensor, index: Tensor, method: str) -> Tensor:
        ctx.save_for_backward(query, rows, index)
        forward, ctx.method = _FORWARD[_variant(method, query)], method
        return forward(query.contiguous(), rows.contiguous(), index.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, rows, index = ctx.saved_tensors
        backward = _BACKWARD[_variant(ctx.method, query)]
        dquery, drows = backward(query.contiguous(), rows.contiguous(), index.contiguous(), grad.contiguous())
        return dquery, drows, None, None


def _variant(method: str, query: Tensor) -> str:
    if method == "picked":
        return "sparse" if query.device.type == "cpu" else "gathered"
    return method


def _chunk(query: Tensor, elements_per_token: int) -> int:
    elements = _CHUNK_ELEMENTS.get(query.device.type, _DEVICE_CHUNK_ELEMENTS)
    return max(1, elements // elements_per_token)


def _all_rows_forward(query: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    chunk = _chunk(query, rows.shape[0])
    out = query.new_empty(index.shape)
    for part, picked, q in zip(out.split(chunk), index.split(chunk), query.split(chunk), strict=True):
        torch.gather(q @ rows.T, 1, picked, out=part)
    return out


def _all_rows_backward(query: Tensor, rows: Tensor, index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    chunk = _chunk(query, rows.shape[0])
    dquery, drows = torch.empty_like(query), torch.zeros_like(rows)
    parts = zip(*(x.split(chunk) for x in (query, index, grad, dquery)), strict=True)
    for q, picked, g, dq in parts:
        dense = _scatter_rows(picked, g, rows.shape[0])
        torch.mm(dense, rows, out=dq)
        drows.addmm_(dense.T, q)
    return dquery, drows


def _scatter_rows(index: Tensor, values: Tensor, width: int) -> Tensor:
    """[t, N] values summed into [t, width] at `index`."""
    dense = values.new_zeros(index.shape[0], width)
    if values.device.type == "cpu":
        return dense.scatter_add_(1, index, values)
    # Columns that repeat within a row are rare; index_put_ sorts, so that sums do not depend on the order of threads.
    token = torch.arange(index.shape[0], device=index.device).unsqueeze(1).expand_as(index)
    return dense.index_put_((token, index), values, accumulate=True)


def _sparse_forward(query: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    tokens, picks = index.shape
    starts = torch.arange(0, tokens * picks + 1, picks)
    # The pattern may repeat a column within a row and is not sorted: sampled_addmm reads it entry by entry.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            starts, index.flatten(), query.new_zeros(tokens * picks), (tokens, rows.shape[0]), check_invariants=False
        )
    return torch.sparse.sampled_addmm(pattern, query, rows.T, beta=0.0).values().view(tokens, picks)


def _sparse_backward(query: Tensor, rows: Tensor, index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    tokens, picks = index.shape
    starts = torch.arange(0, tokens * picks, picks)
    dquery = torch.nn.functional.embedding_bag(
        index.flatten(), rows, starts, mode="sum", per_sample_weights=grad.flatten()
    )
    order = _stable_order(index.flatten(), rows.shape[0])
    counts = torch.bincount(index.flatten(), minlength=rows.shape[0])
    drows = torch.nn.functional.embedding_bag(
        order.div(picks, rounding_mode="floor"),
        query,
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=grad.flatten().index_select(0, order),
    )
    return dquery, drows


def _stable_order(index: Tensor, size: int) -> Tensor:
    narrow = torch.int16 if size <= 1 << 15 else torch.int32 if size < 1 << 31 else torch.int64
    return index.to(narrow).argsort(stable=True)


def _gathered_forward(query: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    chunk = _chunk(query, index.shape[1] * rows.shape[1])
    out = query.new_empty(index.shape)
    for part, picked, q in zip(out.split(chunk), index.split(chunk), query.split(chunk), strict=True):
        torch.bmm(_gather(rows, picked), q.unsqueeze(2), out=part.unsqueeze(2))
    return out


def _gathered_backward(query: Tensor, rows: Tensor, index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    chunk = _chunk(query, index.shape[1] * rows.shape[1])
    dquery, drows = torch.empty_like(query), torch.zeros_like(rows)
    parts = zip(*(x.split(chunk) for x in (query, index, grad, dquery)), strict=True)
    for q, picked, g, dq in parts:
        torch.bmm(g.unsqueeze(1), _gather(rows, picked), out=dq.unsqueeze(1))
        values = (g.unsqueeze(2) * q.unsqueeze(1)).flatten(0, 1)
        drows.index_put_((picked.flatten(),), values, accumulate=True)  # sorts: deterministic on a GPU
    return dquery, drows


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index.flatten()).view(*index.shape, -1)


_FORWARD: dict[str, Forward] = {
    "all_rows": _all_rows_forward,
    "sparse": _sparse_forward,
    "gathered": _gathered_forward,
}
_BACKWARD: dict[str, Backward] = {
    "all_rows": _all_rows_backward,
    "sparse": _sparse_backward,
    "gathered": _gathered_backward,
}
