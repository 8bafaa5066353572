"""Law: AUC and GAUC equal the share of ordered pairs, NE the ratio of entropies."""

import numpy as np
import pytest
from grzoo.recipes.click_metrics import click_metrics


def pairs_auc(labels, scores):
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative):
        return None
    return np.mean([(p > negative).mean() + 0.5 * (p == negative).mean() for p in positive])


def test_against_all_pairs():
    rng = np.random.default_rng(0)
    labels, scores, users = rng.integers(0, 2, 200), rng.integers(-3, 4, 200).astype(float), rng.integers(0, 30, 200)
    labels[users == 3] = 1  # a user without a negative does not count
    found = click_metrics(labels.astype(float), scores, users)
    assert found["auc"] == pytest.approx(pairs_auc(labels, scores))
    per_user = [(pairs_auc(labels[users == u], scores[users == u]), (users == u).sum()) for u in range(30)]
    per_user = [(auc, n) for auc, n in per_user if auc is not None]
    assert found["gauc"] == pytest.approx(sum(a * n for a, n in per_user) / sum(n for _, n in per_user))
    p = 1 / (1 + np.exp(-scores))
    loss = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert found["logloss"] == pytest.approx(loss)
    mean = labels.mean()
    assert found["ne"] == pytest.approx(loss / -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)))


def test_the_base_rate_has_ne_one():
    labels = np.array([1, 0, 0, 0])
    assert click_metrics(labels, np.full(4, np.log(1 / 3)), np.zeros(4))["ne"] == pytest.approx(1)


def test_undefined_is_nan_and_divergence_is_named():
    assert np.isnan(click_metrics(np.ones(3), np.zeros(3), np.zeros(3))["auc"])
    assert np.isnan(click_metrics(np.ones(0), np.zeros(0), np.zeros(0))["logloss"])
    with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
        click_metrics(np.array([0, 1]), np.array([0, np.nan]), np.zeros(2))
