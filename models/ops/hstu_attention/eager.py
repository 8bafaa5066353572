"""HSTU attention without a kernel: groups of sequences of nearly equal length, blocks of rows, recomputing backward.

Work and memory: a block holds b x rows x columns scores with columns only up to its last row, so that neither padding
to the longest sequence nor the masked half costs much; what the backward pass keeps is the packed inputs, linear in
tokens.
"""

from typing import Any

import torch
from grzoo.models.packing import JaggedLayout
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bias import position_bias, position_bias_gradient, time_bias_gradient
from .grouping import Group, GroupPlan, plan_groups


@torch.compiler.disable  # its loop over pieces, written into buffers, cannot be traced
def hstu_attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    *,
    max_length: int,
    position_table: Tensor,
    time_table: Tensor | None = None,
) -> Tensor:
    """`hstu_attention_naive` (formula and shapes there) with little padded work and memory linear in the tokens.

    Scores, bias and silu are float32 (float64 for float64 input); on a GPU the products take the dtype of `value`.
    """
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    time = None if time_table is None else time_table.to(wide)
    out: Tensor = _GroupedAttention.apply(query, key, value, position_table.to(wide), time, layout, max_length)
    return out


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_table: Tensor,
        time_table: Tensor | None,
        layout: JaggedLayout,
        max_length: int,
    ) -> Tensor:
        plan = plan_groups(layout, query.shape[1])
        ctx.save_for_backward(query, key, value, position_table, time_table)
        ctx.plan, ctx.max_length = plan, max_length
        dtype = _product_dtype(value)
        q, k, v = (_padded(x, dtype) for x in (query, key, value))
        out = q.new_empty((v.shape[0], *value.shape[1:]))
        for number, group in enumerate(plan.groups):
            qg, kg, vg = (_take(x, group) for x in (q, k, v))
            og = vg.new_empty(vg.shape)
            for first, end in group.blocks:
                bias = _bias(plan, number, first, end, position_table, time_table)
                weights = torch.nn.functional.silu(_scores(qg, kg, bias, first, end), inplace=True)
                weights[..., first:end].tril_()
                torch.bmm(weights.to(dtype), vg[:, :end], out=og[:, first:end])
            _put(out, og, group)
        return out[:-1].div_(max_length).to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, position_table, time_table = ctx.saved_tensors
        plan: GroupPlan = ctx.plan
        dtype = _product_dtype(value)
        q, k, v = (_padded(x, dtype) for x in (query, key, value))
        g = _padded(grad_out, dtype).div_(ctx.max_length)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dposition = torch.zeros_like(position_table)
        dtime = None if time_table is None else torch.zeros_like(time_table)
        for number, group in enumerate(plan.groups):
            qg, kg, vg, gg = (_take(x, group) for x in (q, k, v, g))
            dqg, dkg, dvg = torch.empty_like(qg), torch.zeros_like(kg), torch.zeros_like(vg)
            for first, end in group.blocks:
                scores = _scores(qg, kg, _bias(plan, number, first, end, position_table, time_table), first, end)
                weights = torch.nn.functional.silu(scores)
                weights[..., first:end].tril_()
                dweights = torch.bmm(gg[:, first:end], vg[:, :end].mT).to(scores.dtype)
                dscores = torch.ops.aten.silu_backward(dweights, scores)
                dscores[..., first:end].tril_()
                _add_table_gradients(plan, number, first, end, dscores, dposition, dtime)
                dscores, weights = dscores.to(dtype), weights.to(dtype)
                torch.bmm(dscores, kg[:, :end], out=dqg[:, first:end])
                dkg[:, :end].baddbmm_(dscores.mT, qg[:, first:end])
                dvg[:, :end].baddbmm_(weights.mT, gg[:, first:end])
            for total, part in ((dq, dqg), (dk, dkg), (dv, dvg)):
                _put(total, part, group)
        dq, dk, dv = (x[:-1].to(like.dtype) for x, like in ((dq, query), (dk, key), (dv, value)))
        return dq, dk, dv, dposition, dtime, None, None


def _product_dtype(value: Tensor) -> torch.dtype:
    low_precision = value.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if low_precision and value.device.type == "cpu" else value.dtype


def _padded(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, H, d] -> [T + 1, H, d] in `dtype`; the last row, which padded places point to, is zero."""
    padded = packed.new_empty((packed.shape[0] + 1, *packed.shape[1:]), dtype=dtype)
    padded[:-1] = packed
    padded[-1] = 0
    return padded


def _take(padded: Tensor, group: Group) -> Tensor:
    """[T + 1, H, d] -> [b * H, length, d]."""
    rows = padded.index_select(0, group.index).view(group.size, group.length, *padded.shape[1:])
    return rows.transpose(1, 2).reshape(-1, group.length, padded.shape[2])


def _put(padded: Tensor, rows: Tensor, group: Group) -> None:
    """Inverse of `_take`; padded places all land in the last row, which is thrown away."""
    heads, width = padded.shape[1:]
    rows = rows.view(group.size, heads, group.length, width).transpose(1, 2)
    padded.index_copy_(0, group.index, rows.reshape(-1, heads, width))


def _bias(
    plan: GroupPlan, number: int, first: int, end: int, position_table: Tensor, time_table: Tensor | None
) -> Tensor:
    """[b or 1, 1, rows, columns]."""
    bias = position_bias(position_table, first, end - first, end)
    if time_table is None:
        return bias[None, None]
    buckets = plan.buckets(number, first, end, time_table.numel())
    return time_table.index_select(0, buckets).view(-1, 1, end - first, end).add_(bias)


def _scores(q: Tensor, k: Tensor, bias: Tensor, first: int, end: int) -> Tensor:
    """[b * H, rows, columns] in the dtype of the bias."""
    scores = torch.bmm(q[:, first:end], k[:, :end].mT).to(bias.dtype)
    heads = scores.shape[0] // bias.shape[0] if bias.shape[0] > 1 else 1
    scores.view(-1, heads, *scores.shape[1:]).add_(bias)
    return scores


def _add_table_gradients(
    plan: GroupPlan, number: int, first: int, end: int, dscores: Tensor, dposition: Tensor, dtime: Tensor | None
) -> None:
    size = plan.groups[number].size
    per_sequence = dscores.view(size, -1, end - first, end).sum(1) if dscores.shape[0] > size else dscores
    position_bias_gradient(per_sequence.sum(0), first, dposition)
    if dtime is not None:
        buckets = plan.buckets(number, first, end, dtime.numel())
        time_bias_gradient(per_sequence.reshape(-1), buckets, dtime)
