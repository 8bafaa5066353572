"""Ground truth of the sampled softmax: materialises [T, N, D], float32 (float64 when given)."""

import torch
from torch import Tensor

MASKED_LOGIT = -5e4  # of a negative that equals the positive
NORM_FLOOR = 1e-6


def l2_normalize(x: Tensor) -> Tensor:
    """`x / max(1e-6, |x|)` over the last dimension."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


def sampled_logits_naive(query: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """`out[t, n] = query[t] . rows[index[t, n]]`.

    Args:
        query: [T, D].
        rows: [U, D].
        index: int64 [T, N].

    Returns:
        [T, N].
    """
    return torch.einsum("td,tnd->tn", query, rows[index])


def sampled_softmax_loss_naive(
    query: Tensor,
    rows: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    accidental: Tensor,
    *,
    temperature: float,
    positive_log_q: Tensor | None = None,
    negative_log_q: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Sum over t of `-log softmax([s(t, positive), s(t, negatives)])[0]`.

    `s(t, i) = q_t . r_i / (|q_t| |r_i| temperature) - log_q_i`; a negative that is accidentally the positive gets -5e4.

    Args:
        query: [T, D], any float dtype.
        rows: float32 [U, D], the item rows that the indices point into.
        positive_index: int64 [T].
        negative_index: int64 [T, N], or [N] for negatives shared by all tokens.
        accidental: bool [T, N], where the negative is the positive.
        temperature: positive.
        positive_log_q: float32 [T] and negative_log_q: float32 [N]: logarithm of the probability with which an item
            is drawn as a shared negative. The expected count of N draws is N q; the log N cancels between positive and
            negatives.
        normalize: False leaves out the division by |q_t| |r_i|: inner products instead of cosines.

    Returns:
        Scalar: a sum, not a mean.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, rows = query.to(dtype), rows.to(dtype)
    if normalize:
        query, rows = l2_normalize(query), l2_normalize(rows)
    negative_index = negative_index.expand(query.shape[0], -1)
    positive = sampled_logits_naive(query, rows, positive_index.unsqueeze(1)) / temperature
    negative = sampled_logits_naive(query, rows, negative_index) / temperature
    if positive_log_q is not None and negative_log_q is not None:
        positive, negative = positive - positive_log_q.unsqueeze(1), negative - negative_log_q
    negative = negative.masked_fill(accidental, MASKED_LOGIT)
    return -torch.cat([positive, negative], dim=1).log_softmax(1)[:, 0].sum()
