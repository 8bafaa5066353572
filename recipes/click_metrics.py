"""Metrics of predicted probabilities of binary labels: AUC, GAUC, log loss, normalised entropy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .runtime import UserError


def click_metrics(labels: NDArray[Any], logits: NDArray[Any], users: NDArray[Any]) -> dict[str, float]:
    """AUC, GAUC, log loss and NE of n exposures.

    GAUC: AUC within each user that has both labels, weighted by the user's exposures (arXiv 1706.06978). NE: log loss
    over the entropy of the mean label (He et al., ADKDD 2014): below 1 is better than predicting the mean.

    Args:
        labels: [n] of 0 and 1.
        logits: [n], any order-preserving score for AUC and GAUC, log odds for the other two.
        users: [n] any values, equal for the exposures of a user.

    Returns:
        `auc`, `gauc`, `logloss`, `ne`; NaN where they are undefined (one label only).

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import log_loss, roc_auc_score
    except ImportError as error:
        raise UserError("ranking metrics need scikit-learn: pip install 'grzoo[ranking]'") from error
    labels = labels.astype(np.int64)
    nothing = {"auc": np.nan, "gauc": np.nan, "logloss": np.nan, "ne": np.nan}
    if not len(labels):
        return nothing
    if not np.isfinite(logits).all():
        raise ValueError(
            f"{int((~np.isfinite(logits)).sum())} of {len(logits)} scores are not finite: training diverged"
        )
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64).clip(-500, 500)))
    loss, mean = float(log_loss(labels, probabilities, labels=[0, 1])), float(labels.mean())
    if not 0 < mean < 1:
        return {**nothing, "logloss": loss}
    entropy = -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean))
    order = np.argsort(users, kind="stable")
    bounds = np.flatnonzero(np.diff(users[order])) + 1
    areas, weights = [], []
    for of_user in np.split(order, bounds):
        if 0 < labels[of_user].mean() < 1:
            areas.append(roc_auc_score(labels[of_user], logits[of_user]))
            weights.append(len(of_user))
    gauc = float(np.average(areas, weights=weights)) if areas else np.nan
    return {"auc": float(roc_auc_score(labels, logits)), "gauc": gauc, "logloss": loss, "ne": float(loss / entropy)}
