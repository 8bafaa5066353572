"""Silu attention without a kernel: groups of sequences of nearly equal length, blocks of rows, recomputing backward.

Columns that no other token may see (the candidates) are not computed: a token that sees itself on top of the rule of
times adds its own term. What the backward pass keeps is the packed inputs, linear in tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from grzoo.models.ops.hstu_attention.eager import _padded, _product_dtype, _put, _take
from grzoo.models.ops.hstu_attention.grouping import Group, GroupPlan, plan_groups
from grzoo.models.packing import JaggedLayout
from torch import Tensor
from torch.autograd.function import once_differentiable

from .visibility import NEVER, Visibility

_MASK_CACHE_BYTES = 64 << 20


@torch.compiler.disable  # its loop over pieces, written into buffers, cannot be traced
def silu_attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    visibility: Visibility,
    *,
    divisors: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """`silu_attention_naive` (formula and shapes there) with little padded work and memory linear in the tokens.

    Scores and silu are float32 (float64 for float64 input); on a GPU the products take the dtype of `value`.
    """
    masks = _masks(layout, visibility, query.shape[1])
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    own = torch.nn.functional.silu(scale * (query.to(wide) * key.to(wide)).sum(-1, keepdim=True))
    out = torch.where(masks.only_itself[:, None, None], own * value.to(wide), 0.0)
    out = out + _MaskedAttention.apply(query, key, value, masks, scale)
    return (out / divisors.to(wide)[:, None, None]).to(value.dtype)


@dataclass
class _Masks:
    """The groups of a layout with, for each block of rows, who sees whom; shared by the layers of a forward pass."""

    plan: GroupPlan
    visibility: Visibility
    times: list[tuple[Tensor, Tensor]]  # per group: query times [b, length], key times [b, columns]
    only_itself: Tensor  # bool [T]
    cached_bytes: int = 0
    cache: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def of(self, number: int, first: int, end: int) -> Tensor:
        """bool [b, 1, rows, columns]."""
        if (number, first) not in self.cache:
            query_times, key_times = self.times[number]
            mask = self.visibility.sees(query_times[:, first:end], key_times).unsqueeze(1)
            if self.cached_bytes + mask.nbytes > _MASK_CACHE_BYTES:
                return mask
            self.cached_bytes += mask.nbytes
            self.cache[number, first] = mask
        return self.cache[number, first]

    def columns(self, number: int) -> int:
        """Tokens of a group's sequences, from the first, that others can see."""
        return self.times[number][1].shape[1]


def _masks(layout: JaggedLayout, visibility: Visibility, num_heads: int) -> _Masks:
    cache_key = ("silu_masks", id(visibility), num_heads)
    if cache_key not in layout.cache:
        plan = plan_groups(layout, num_heads)
        padded = [
            torch.nn.functional.pad(x, (0, 1), value=NEVER) for x in (visibility.query_times, visibility.key_times)
        ]
        times = [_group_times(group, *padded) for group in plan.groups]
        layout.cache[cache_key] = _Masks(plan, visibility, times, visibility.only_itself())
    masks: _Masks = layout.cache[cache_key]
    return masks


def _group_times(group: Group, query_times: Tensor, key_times: Tensor) -> tuple[Tensor, Tensor]:
    index = group.index.view(group.size, group.length)
    keys = key_times[index]
    seen = (keys < NEVER).any(0).nonzero()
    columns = int(seen[-1]) + 1 if len(seen) else 1
    return query_times[index], keys[:, :columns].contiguous()


class _MaskedAttention(torch.autograd.Function):
    """The sum over the tokens that the rule of times shows."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, masks: _Masks, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.masks, ctx.scale = masks, scale
        dtype = _product_dtype(value)
        q, k, v = (_padded(x, dtype) for x in (query, key, value))
        out = q.new_empty((v.shape[0], *value.shape[1:]))
        for number, group in enumerate(masks.plan.groups):
            columns = masks.columns(number)
            qg, kg, vg = (_take(x, group) for x in (q, k, v))
            og = vg.new_empty(vg.shape)
            for first, end in group.blocks:
                mask = masks.of(number, first, end)
                weights = _hide(torch.nn.functional.silu(_scores(qg, kg, first, end, columns, scale)), mask)
                torch.bmm(weights.to(dtype), vg[:, :columns], out=og[:, first:end])
            _put(out, og, group)
        return out[:-1].to(torch.float64 if value.dtype == torch.float64 else torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        masks, scale = ctx.masks, ctx.scale
        dtype = _product_dtype(value)
        q, k, v, g = (_padded(x, dtype) for x in (query, key, value, grad_out))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for number, group in enumerate(masks.plan.groups):
            columns = masks.columns(number)
            qg, kg, vg, gg = (_take(x, group) for x in (q, k, v, g))
            dqg, dkg, dvg = torch.empty_like(qg), torch.zeros_like(kg), torch.zeros_like(vg)
            for first, end in group.blocks:
                mask = masks.of(number, first, end)
                scores = _scores(qg, kg, first, end, columns, scale)
                weights = _hide(torch.nn.functional.silu(scores), mask)
                dweights = torch.bmm(gg[:, first:end], vg[:, :columns].mT).to(scores.dtype)
                dscores = _hide(torch.ops.aten.silu_backward(dweights, scores).mul_(scale), mask)
                dscores, weights = dscores.to(dtype), weights.to(dtype)
                torch.bmm(dscores, kg[:, :columns], out=dqg[:, first:end])
                dkg[:, :columns].baddbmm_(dscores.mT, qg[:, first:end])
                dvg[:, :columns].baddbmm_(weights.mT, gg[:, first:end])
            for total, part in ((dq, dqg), (dk, dkg), (dv, dvg)):
                _put(total, part, group)
        return *(x[:-1].to(like.dtype) for x, like in ((dq, query), (dk, key), (dv, value))), None, None


def _scores(q: Tensor, k: Tensor, first: int, end: int, columns: int, scale: float) -> Tensor:
    """[b * H, rows, columns], at least float32."""
    scores = torch.bmm(q[:, first:end], k[:, :columns].mT)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores if scale == 1 else scores.mul_(scale)


def _hide(weights: Tensor, mask: Tensor) -> Tensor:
    """Zero [b * H, rows, columns] in place where the mask bool [b, 1, rows, columns] is not set."""
    weights.view(mask.shape[0], -1, *weights.shape[1:]).mul_(mask)
    return weights
