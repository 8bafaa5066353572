"""Ground truth of HSTU attention: one sequence after the other, float32 (float64 when given), autograd."""

import torch
from grzoo.models.packing import JaggedLayout
from torch import Tensor

from .bias import time_buckets


def hstu_attention_naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    *,
    max_length: int,
    position_table: Tensor,
    time_table: Tensor | None = None,
) -> Tensor:
    """`out_i = sum over j <= i of silu(q_i . k_j + rab_ij) v_j / n`, per head, with n = `max_length`.

    `rab_ij = position_table[n - 1 + j - i] + time_table[bucket(target_timestamps_i - timestamps_j)]` is shared by the
    heads; there is no 1/sqrt(d), no softmax, and n is a constant of the model, not the length of the sequence.

    Args:
        query, key: [T, H, dqk] packed tokens.
        value: [T, H, dv].
        layout: the sequences; with times when `time_table` is given. No sequence is longer than `max_length`.
        position_table: [2 * max_length - 1].
        time_table: [number of time buckets], or None for no time bias.

    Returns:
        [T, H, dv], dtype of `value`.

    Source: arXiv 2402.17152, equations 1-3 and section 3.
    """
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    out = [v.new_zeros(0, *v.shape[1:])]
    start = 0
    for length in layout.lengths:
        rows = slice(start, start + length)
        i, j = torch.meshgrid(*[torch.arange(length, device=q.device)] * 2, indexing="ij")
        rab = position_table.to(dtype)[max_length - 1 + j - i]
        if time_table is not None:
            assert layout.timestamps is not None and layout.target_timestamps is not None
            buckets = time_buckets(layout.target_timestamps[rows], layout.timestamps[rows], time_table.numel())
            rab = rab + time_table.to(dtype)[buckets.long()]
        scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) + rab
        weights = torch.nn.functional.silu(scores) / max_length * (j <= i)
        out.append(torch.einsum("hij,jhd->ihd", weights, v[rows]))
        start += length
    # The sum of nothing keeps every input in the graph when there is no token.
    inputs = [q, k, v, position_table, *([] if time_table is None else [time_table])]
    return (torch.cat(out) + sum(x[:0].sum() for x in inputs)).to(value.dtype)
