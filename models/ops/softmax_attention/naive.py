"""Ground truth of causal softmax attention: one sequence after the other, float32 (float64 when given), autograd."""

import torch
from grzoo.models.packing import JaggedLayout
from torch import Tensor


def softmax_attention_naive(query: Tensor, key: Tensor, value: Tensor, layout: JaggedLayout) -> Tensor:
    """`out_i = sum over j <= i of softmax_j(q_i . k_j / sqrt(d)) v_j`, per head.

    Args:
        query, key, value: [T, H, d] packed tokens.
        layout: the sequences.

    Returns:
        [T, H, d], dtype of `value`.
    """
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    out = [v.new_zeros(0, *v.shape[1:])]
    start = 0
    for length in layout.lengths:
        rows = slice(start, start + length)
        scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) / q.shape[2] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        out.append(torch.einsum("hij,jhd->ihd", weights, v[rows]))
        start += length
    # The sum of nothing keeps every input in the graph when there is no token.
    return (torch.cat(out) + sum(x[:0].sum() for x in (q, k, v))).to(value.dtype)
