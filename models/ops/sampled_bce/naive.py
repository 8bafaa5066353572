"""Ground truth of the binary cross-entropy over sampled negatives: materialises [T, N, D], float32 (or float64)."""

import torch
from grzoo.models.ops.sampled_softmax.naive import l2_normalize, sampled_logits_naive
from torch import Tensor


def sampled_bce_loss_naive(
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
    """Sum over t of `-log(sigmoid(s(t, positive))^positive_power) - sum_n log(1 - sigmoid(s(t, n)))`.

    `s(t, i) = q_t . r_i / temperature`, with `normalize` of the normalised vectors. A negative that is accidentally the
    positive counts 0.

    Args:
        query: [T, D], any float dtype.
        rows: float32 [U, D], the item rows that the indices point into.
        positive_index: int64 [T].
        negative_index: int64 [T, N].
        accidental: bool [T, N], where the negative is the positive.
        temperature: positive.
        positive_power: beta of gBCE (arXiv 2308.07192); 1 is SASRec's loss.
        normalize: cosines instead of inner products.

    Returns:
        Scalar: a sum, not a mean.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, rows = query.to(dtype), rows.to(dtype)
    if normalize:
        query, rows = l2_normalize(query), l2_normalize(rows)
    positive = sampled_logits_naive(query, rows, positive_index.unsqueeze(1)) / temperature
    negative = sampled_logits_naive(query, rows, negative_index) / temperature
    log_positive = positive_power * torch.sigmoid(positive).log()
    log_negative = (1 - torch.sigmoid(negative)).log()
    return -log_positive.sum() - torch.where(accidental, 0, log_negative).sum()
