"""Binary cross-entropy over sampled negatives without a [T, N, D] tensor."""

import torch
from grzoo.models.ops.sampled_softmax.loss import own_logits
from grzoo.models.ops.sampled_softmax.naive import l2_normalize
from torch import Tensor
from torch.nn import functional as F


@torch.compiler.disable  # torch cannot go on inside the autocast block after `sampled_logits`
def sampled_bce_loss(
    query: Tensor,
    rows: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    accidental: Tensor,
    *,
    temperature: float = 1.0,
    positive_power: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """`sampled_bce_loss_naive` (formula and shapes there), stable for large scores, always in float32."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        query = query.to(dtype)
        if normalize:
            query = l2_normalize(query)
        index = torch.cat([positive_index.unsqueeze(1), negative_index], dim=1)
        logits = own_logits(query, rows.to(dtype), index, normalize) / temperature
        positive, negative = F.softplus(-logits[:, 0]), F.softplus(logits[:, 1:])
        return positive_power * positive.sum() + negative.masked_fill(accidental, 0).sum()
