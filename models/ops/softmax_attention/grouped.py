"""Causal softmax attention by torch's SDPA, called once for each group of sequences of nearly equal length."""

from dataclasses import dataclass

import torch
from grzoo.models.ops.hstu_attention.grouping import group_lengths
from grzoo.models.packing import JaggedLayout
from torch import Tensor

# Queries of a group: enough to amortise a call, few enough for the cache of a CPU core.
_GROUP_TOKENS = {"cpu": 1 << 12}
_DEVICE_GROUP_TOKENS = 1 << 20


def softmax_attention_grouped(query: Tensor, key: Tensor, value: Tensor, layout: JaggedLayout) -> Tensor:
    """`softmax_attention_naive` (formula and shapes there): within a group the padding is at most an eighth.

    Sequences are padded at their end, so the causal mask alone keeps padding from every event.
    """
    low_precision = value.dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if low_precision and value.device.type == "cpu" else value.dtype
    plan = _plan(layout)
    if not plan.shapes:
        return value + 0 * (query.sum() + key.sum())
    padded = (torch.cat([x.to(dtype), x.new_zeros(1, *x.shape[1:], dtype=dtype)]) for x in (query, key, value))
    groups = zip(*(x.index_select(0, plan.tokens).split(plan.sizes) for x in padded), strict=True)
    parts = []
    for shape, group in zip(plan.shapes, groups, strict=True):
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in group)  # [b, H, L, d]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).index_select(0, plan.places).to(value.dtype)


@dataclass
class _Plan:
    """Groups of sequences, one behind the other, each padded to its longest one.

    Attributes:
        shapes: (sequences, length) of each group.
        tokens: int64 [sum of the areas], the token at each place, T where there is none.
        places: int64 [T], the place of each token.
    """

    shapes: list[tuple[int, int]]
    tokens: Tensor
    places: Tensor

    @property
    def sizes(self) -> list[int]:
        return [size * length for size, length in self.shapes]


def _plan(layout: JaggedLayout) -> _Plan:
    """The groups of a layout; made once per forward pass and shared by the layers."""
    if "softmax_attention" not in layout.cache:
        starts = layout.cu_seq_lens
        limit = _GROUP_TOKENS.get(starts.device.type, _DEVICE_GROUP_TOKENS)
        shapes, tokens = [], [starts.new_empty(0)]
        for members in group_lengths(layout.lengths, max_area=limit, block_rows=1):
            number = torch.tensor(members).to(starts.device, non_blocking=True)
            length = layout.lengths[members[0]]
            token = starts[number].unsqueeze(1) + torch.arange(length, device=starts.device)
            tokens.append(torch.where(token < starts[number + 1].unsqueeze(1), token, layout.num_tokens).flatten())
            shapes.append((len(members), length))
        flat = torch.cat(tokens)
        places = flat.new_empty(layout.num_tokens + 1)
        places[flat] = torch.arange(flat.numel(), device=flat.device)
        layout.cache["softmax_attention"] = _Plan(shapes, flat, places[:-1])
    plan: _Plan = layout.cache["softmax_attention"]
    return plan
