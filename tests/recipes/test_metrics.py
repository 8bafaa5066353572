"""Law: metrics equal their definitions, checked against a loop and against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from grzoo.recipes.metrics import ranking_metrics
from grzoo.recipes.popularity import PopularityRanking
from sklearn.metrics import ndcg_score


def test_against_scikit_learn_and_a_loop():
    generator = np.random.default_rng(0)
    users, items = 37, 60
    scores = generator.normal(size=(users, items))
    targets = generator.integers(items, size=users)
    ranks = [1 + int((scores[u] > scores[u, t]).sum()) for u, t in enumerate(targets)]
    metrics = ranking_metrics(torch.tensor(ranks), [1, 5, 50])
    relevance = np.eye(items)[targets]
    for k in (1, 5, 50):
        assert metrics[f"ndcg@{k}"] == pytest.approx(ndcg_score(relevance, scores, k=k), abs=1e-12)
        assert metrics[f"hr@{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / users)
    assert metrics["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / users)


def test_no_users_is_not_a_number():
    assert math.isnan(ranking_metrics(torch.zeros(0, dtype=torch.int64))["ndcg@10"])


def brute_force_rank(ids, counts, target, seen):
    order = sorted(range(len(ids)), key=lambda i: (-counts[i], ids[i]))
    shown = [ids[i] for i in order if ids[i] == target or ids[i] not in seen]
    return shown.index(target) + 1


@pytest.mark.parametrize("with_seen", [False, True])
def test_popularity_against_brute_force(with_seen):
    generator = np.random.default_rng(1)
    ids = generator.permutation(np.array([-(2**63), -5, 0, 3, 9, 11, 40, 2**63 - 1]))
    counts = generator.integers(3, size=len(ids))  # many ties
    histories = [generator.choice(ids, size=n) for n in (0, 1, 5, 8, 3)]  # repeats
    targets = generator.choice(ids, size=len(histories))
    histories[3][0] = targets[3]  # seen before: not left out for this user
    if not with_seen:
        histories = [h[:0] for h in histories]
    offsets = np.cumsum([0] + [len(h) for h in histories])
    ranks = PopularityRanking(ids, counts).ranks(targets, np.concatenate(histories).astype(np.int64), offsets)
    for user, target in enumerate(targets):
        assert ranks[user] == brute_force_rank(ids.tolist(), counts.tolist(), target, set(histories[user].tolist()))


def test_item_outside_the_catalogue_stands_behind_it():
    ranking = PopularityRanking(np.array([4, 7]), np.array([1, 2]))
    none = np.zeros(0, np.int64)
    assert ranking.ranks(np.array([7, 4, 99]), none, np.zeros(4, np.int64)).tolist() == [1, 2, 3]
    assert ranking.ranks(none, none, np.zeros(1, np.int64)).tolist() == []
