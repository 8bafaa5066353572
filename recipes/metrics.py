"""Ranking metrics of one relevant item per user, from the rank at which it stands."""

from collections.abc import Sequence

import torch
from torch import Tensor


def ranking_metrics(ranks: Tensor, cutoffs: Sequence[int] = (5, 10, 20, 50, 200)) -> dict[str, float]:
    """Means over users of HR@k, NDCG@k and MRR.

    With one relevant item of rank r (1 = best): HR@k = [r <= k], NDCG@k = [r <= k] / log2(1 + r), MRR = 1 / r.

    Args:
        ranks: integer [U], the rank of each user's target, from 1.
        cutoffs: the values of k.

    Returns:
        `hr@k` and `ndcg@k` for each k, and `mrr`; NaN without users.

    Example:
        >>> ranking_metrics(torch.tensor([1, 3]), [2])
        {'hr@2': 0.5, 'ndcg@2': 0.5, 'mrr': 0.6666666666666666}
    """
    r = ranks.double()
    gain = 1.0 / torch.log2(1.0 + r)
    metrics: dict[str, float] = {}
    for k in cutoffs:
        metrics[f"hr@{k}"] = (r <= k).double().mean().item()
        metrics[f"ndcg@{k}"] = torch.where(r <= k, gain, 0.0).mean().item()
    metrics["mrr"] = (1.0 / r).mean().item()
    return metrics
