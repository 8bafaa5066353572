"""Top-k and ranks over a catalogue equal brute force, with ties, seen items and strangers."""

import pytest
import torch
from grzoo.models import ShardedCatalogue, retrieval
from retrieval_jobs import VectorModel, catalogue_case, expected


def catalogue_of(case):
    model = VectorModel()
    model.fill(case["ids"], case["vectors"])
    return ShardedCatalogue(model, case["ids"])


@pytest.mark.parametrize("scores_at_once", [1, 100, 1 << 24])
@pytest.mark.parametrize("users, items, k", [(0, 5, 2), (30, 1, 1), (17, 40, 40), (25, 37, 10)])
def test_equals_brute_force(users, items, k, scores_at_once, monkeypatch):
    monkeypatch.setattr(retrieval, "_SCORES_AT_ONCE", scores_at_once)
    case = catalogue_case(0, users=users, items=items)
    catalogue, exclude = catalogue_of(case), (case["seen"], case["starts"])
    ids, scores = catalogue.top_k(case["queries"], k, exclude)
    ranks = catalogue.ranks(case["queries"], case["targets"], exclude)
    assert ids.shape == scores.shape == (users, k)
    for user in range(users):
        assert (ids[user].tolist(), scores[user].tolist(), ranks[user].item()) == expected(case, user, k)


def test_a_target_outside_the_catalogue_comes_last():
    case = catalogue_case(1, users=4, items=9)
    catalogue = catalogue_of(case)
    assert catalogue.ranks(case["queries"], torch.full((4,), -5)).tolist() == [10] * 4
    left = [
        9 - len(set(case["seen"][a:b].tolist()) & set(case["ids"].tolist())) for a, b in case["starts"].unfold(0, 2, 1)
    ]
    outside = catalogue.ranks(case["queries"], torch.full((4,), -5), (case["seen"], case["starts"]))
    assert outside.tolist() == [1 + n for n in left]


def test_unknown_candidates_score_zero_and_duplicates_count_once():
    model = VectorModel()
    model.fill(torch.tensor([4]), torch.ones(1, 3))
    catalogue = ShardedCatalogue(model, torch.tensor([4, 7, 4]))
    ids, scores = catalogue.top_k(torch.ones(1, 3), 2)
    assert ids.tolist() == [[4, 7]] and scores.tolist() == [[3.0, 0.0]]
    assert model.embeddings.num_rows() == 1


def test_impossible_questions():
    case = catalogue_case(1, users=4, items=9)
    catalogue = catalogue_of(case)
    with pytest.raises(ValueError, match="between 1 and the number of candidates, 9; got 10"):
        catalogue.top_k(case["queries"], 10)
    with pytest.raises(ValueError, match="got 0"):
        catalogue.top_k(case["queries"], 0)
    with pytest.raises(ValueError, match="not finite"):
        catalogue.ranks(case["queries"] * torch.nan, case["targets"])
    with pytest.raises(ValueError, match=r"\(3,\) target ids do not fit"):
        catalogue.ranks(case["queries"], case["targets"][:3])
    with pytest.raises(ValueError, match="5 starts"):
        catalogue.top_k(case["queries"], 2, (case["seen"], case["starts"][:-1]))
    with pytest.raises(ValueError, match="must be integers; got torch.float32"):
        ShardedCatalogue(VectorModel(), torch.ones(2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_item_without_a_finite_vector_is_named(value):
    """Nothing is ahead of NaN, so such an item had rank 1, and `top_k` broke."""
    case = catalogue_case(1, users=4, items=9)
    case["vectors"][case["ids"] == case["ids"].sort().values[3]] = value
    case["vectors"][case["ids"] == case["ids"].max(), 0] = value
    with pytest.raises(ValueError, match=rf"vectors of 2 items are not finite.*item {case['ids'].sort().values[3]}:"):
        catalogue_of(case)
