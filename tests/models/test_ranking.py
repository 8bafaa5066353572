"""What every ranking model refuses or documents about its input, and the multi-task loss by hand."""

import pytest
import torch
from grzoo.models import (
    DLRMConfig,
    DLRMForRanking,
    DLRMHSTUConfig,
    DLRMHSTUForRanking,
    MTGRConfig,
    MTGRForRanking,
)
from grzoo.models.ranking import multi_task_loss

MODELS = {
    "mtgr": (MTGRForRanking, MTGRConfig),
    "dlrm_hstu": (DLRMHSTUForRanking, DLRMHSTUConfig),
    "dlrm": (DLRMForRanking, DLRMConfig),
}


@pytest.fixture(params=MODELS)
def model(request, ranking_model):
    return ranking_model(*MODELS[request.param])


@pytest.fixture
def batch(ranking):
    return ranking.make_ranking_batch([5, 3], [2, 4])


def test_loss_by_hand():
    logits, labels = torch.tensor([[0.3, -1.0], [2.0, 0.5]]), torch.tensor([[1.0, 0.0], [0.0, 7.0]])
    mask = torch.tensor([[True, True], [True, False]])
    want = (-torch.log(torch.sigmoid(torch.tensor(0.3))) - torch.log(1 - torch.sigmoid(torch.tensor(2.0)))) / 4
    want = want - torch.log(1 - torch.sigmoid(torch.tensor(-1.0))) / 5
    torch.testing.assert_close(multi_task_loss(logits, labels, mask, [4, 5]), want)
    torch.testing.assert_close(multi_task_loss(logits, labels, mask, torch.tensor([4, 5])), want)
    with pytest.raises(ValueError, match="1 denominators, the model has 2 tasks"):
        multi_task_loss(logits, labels, mask, 4)


def test_masked_labels_have_no_gradient():
    logits = torch.tensor([[1.0]], requires_grad=True)
    multi_task_loss(logits, torch.tensor([[float("nan")]]), torch.tensor([[False]])).backward()
    assert logits.grad.item() == 0


def test_cold_user_is_scored_from_profile_and_candidate(model, ranking):
    """An empty history is no error."""
    scores = model.score(**ranking.make_ranking_batch([0], [3]))
    assert scores.shape == (1, 3, 2) and torch.isfinite(scores).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cross_features": None}, r"candidates come without cross_features.*\['count', 'mean'\]"),
        ({"timestamps": None}, "timestamps is missing"),
        ({"candidate_timestamps": None}, "candidate_timestamps is missing"),
        ({"user_features": None}, "user_features is missing"),
        ({"num_recent": torch.tensor([1])}, "num_recent has shape"),
        ({"cu_seq_lens_candidates": torch.tensor([0, 6])}, "2 histories, but 1 groups"),
        ({"attention_mask": torch.ones(1, 8)}, "not both"),
    ],
)
def test_missing_or_misshapen_fields(change, message, model, batch):
    with pytest.raises(ValueError, match=message):
        model(**{**batch, **change})


def test_values_that_are_refused(model, batch):
    for name, at, value, message in [
        ("cross_features", (0, 3, 1), float("nan"), "'mean' of candidate 3 is nan"),
        ("cross_features", (0, 1, 0), float("inf"), "'count' of candidate 1 is inf"),
        ("timestamps", (0, 0), -5, "timestamp -5 is negative"),
        ("candidate_timestamps", (0, 0), -1, "candidate timestamp -1 is negative"),
        ("timestamps", (0, 6), 10**6, "timestamps fall after event 6"),
    ]:
        wrong = {**batch, name: batch[name].clone()}
        wrong[name][at] = value
        with pytest.raises(ValueError, match=message):
            model(**wrong)
    falls = {**batch, "timestamps": torch.tensor([[6, 7, 8, 9, 10, 1, 2, 3]])}  # only from one user to the next
    model(**falls)


def test_unknown_ids_are_scored_and_not_inserted(model, batch):
    strangers = {**batch, "input_ids": batch["input_ids"] + 10**15, "candidate_ids": batch["candidate_ids"] + 10**15}
    before = model.embeddings.num_rows()
    scores = model.score(**strangers)
    assert torch.isfinite(scores).all() and model.embeddings.num_rows() == before


def test_long_history_is_refused_by_forward_and_cut_by_score(model, ranking):
    long = ranking.make_ranking_batch([25, 3], [2, 1])
    with pytest.raises(ValueError, match="25 events, but max_sequence_length is 20"):
        model(**long)
    cut = {name: x[:, 5:] if x.dim() > 1 and x.shape[1] == 28 else x for name, x in long.items()}
    cut["cu_seq_lens_q"] = torch.tensor([0, 20, 23])
    torch.testing.assert_close(model.score(**long), model.score(**cut))


def test_unknown_attention(model):
    with pytest.raises(ValueError, match="attn_implementation"):
        model.set_attn_implementation("fast")
