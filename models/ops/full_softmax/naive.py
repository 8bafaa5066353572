"""Ground truth of the full softmax: all logits at once, float32 (float64 when given)."""

import torch
from torch import Tensor


def full_softmax_loss_naive(query: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """Sum over t of `log sum_c exp(q_t . r_c) - q_t . r_target(t)`.

    Args:
        query: [T, D], any float dtype, already divided by the temperature.
        items: float32 [C, D], the rows of the whole catalogue.
        target: int64 [T], the row of each token's positive.

    Returns:
        Scalar: a sum, not a mean.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = query.to(dtype) @ items.to(dtype).T
    return -logits.log_softmax(1).gather(1, target.unsqueeze(1)).sum()
