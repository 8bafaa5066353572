"""Ground truth of silu attention: one sequence after the other, float32 (float64 when given), autograd."""

import torch
from grzoo.models.packing import JaggedLayout
from torch import Tensor

from .visibility import Visibility


def silu_attention_naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    visibility: Visibility,
    *,
    divisors: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """`out_i = sum over j seen by i of silu(scale q_i . k_j) v_j / divisors_i`, per head; no softmax.

    Args:
        query, key: [T, H, dqk] packed tokens.
        value: [T, H, dv].
        layout: the sequences.
        visibility: which token sees which.
        divisors: float [T].
        scale: factor of the products: 1 in MTGR, 1/sqrt(dqk) in DLRM-HSTU.

    Returns:
        [T, H, dv], dtype of `value`.

    Source: arXiv 2505.18654, section 3 (mask after silu); arXiv 2402.17152.
    """
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    out = [v.new_zeros(0, *v.shape[1:])]
    start = 0
    for length in layout.lengths:
        rows = slice(start, start + length)
        mask = visibility.sees(visibility.query_times[rows], visibility.key_times[rows])
        mask = mask | torch.eye(length, dtype=torch.bool, device=q.device)
        weights = torch.nn.functional.silu(scale * torch.einsum("ihd,jhd->hij", q[rows], k[rows])) * mask
        out.append(torch.einsum("hij,jhd->ihd", weights, v[rows]))
        start += length
    # The sum of nothing keeps every input in the graph when there is no token.
    total = torch.cat(out) + sum(x[:0].sum() for x in (q, k, v))
    return (total / divisors.to(dtype)[:, None, None]).to(value.dtype)
