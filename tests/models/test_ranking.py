"""What every ranking model refuses or documents about its input, and the multi-task loss by hand."""

import sys
import warnings

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
from grzoo.models.ops import keyed_dropout
from grzoo.models.ranking import RankingBatch, multi_task_loss
from huggingface_hub.errors import StrictDataclassClassValidationError

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
        ({"user_keys": torch.zeros(3, dtype=torch.int64)}, r"user_keys has shape \(3,\).* expected \(2,\)"),
        ({"token_keys": torch.zeros(1, 1, dtype=torch.int64)}, r"token_keys has shape \(1, 1\)"),
        ({"candidate_keys": torch.zeros(1, 7, dtype=torch.int64)}, r"candidate_keys has shape \(1, 7\)"),
        ({"token_keys": torch.zeros(1, 8, 2, dtype=torch.int64)}, r"token_keys has shape \(8, 2\).* expected \(8,\)"),
        ({"label_mask": torch.ones(1, 3, 2, dtype=torch.bool)}, r"label_mask has shape \(1, 3, 2\)"),
        ({"timestamps": torch.zeros(1, 8)}, r"timestamps has dtype torch.float32.*\.long\(\)"),
        ({"candidate_timestamps": torch.full((1, 6), float("nan"))}, "candidate_timestamps has dtype torch.float32"),
        ({"num_recent": torch.tensor([1, -2])}, "num_recent is -2"),
        ({"num_items_in_batch": [3, 0]}, r"num_items_in_batch is \[3, 0\]: a denominator is at least 1"),
        ({"num_items_in_batch": torch.tensor([float("nan"), 1])}, "num_items_in_batch is"),
    ],
)
def test_missing_or_misshapen_fields(change, message, model, batch):
    with pytest.raises(ValueError, match=message):
        model(**{**batch, **change})


@pytest.mark.parametrize("ids, starts", [("input_ids", "cu_seq_lens_q"), ("candidate_ids", "cu_seq_lens_candidates")])
def test_packed_input_has_one_row(ids, starts, model, batch):
    """A second row would be left out without a word."""
    with pytest.raises(ValueError, match=rf"{ids} has shape \(2, \d\), expected \[1, tokens\].*{starts}"):
        model(**{**batch, ids: torch.cat([batch[ids]] * 2)})
    with pytest.raises(ValueError, match=rf"{ids} has shape \(\d,\)"):
        model(**{**batch, ids: batch[ids][0]})


def test_broken_starts_are_named(model, batch):
    for name in ("cu_seq_lens_q", "cu_seq_lens_candidates"):
        with pytest.raises(ValueError, match=f"{name} must rise from 0 to the number of tokens"):
            model(**{**batch, name: torch.tensor([0, 1, 2])})


def test_long_term_events_precede_the_candidates(model, batch):
    """Every candidate sees them: one that is not earlier would show a candidate its future."""
    batch["num_recent"] = torch.tensor([4, 1])
    batch["timestamps"] = torch.tensor([[5, 6, 7, 8, 9, 3, 7, 9]])
    batch["candidate_timestamps"] = torch.tensor([[10, 11, 8, 9, 10, 11]])
    model(**batch)
    batch["candidate_timestamps"] = torch.tensor([[10, 11, 8, 7, 10, 11]])  # at, not after, the event of user 1
    with pytest.raises(ValueError, match="long-term event of user 1 .*, at 7, is not before .* first candidate, at 7"):
        model(**batch)
    model(**{**batch, "num_recent": torch.tensor([9, 2])})
    model(**{**batch, "num_recent": None})


def test_values_that_are_refused(model, batch):
    batch["label_mask"][:] = True
    for name, at, value, message in [
        ("cross_features", (0, 3, 1), float("nan"), "'mean' of candidate 3 is nan"),
        ("cross_features", (0, 1, 0), float("inf"), "'count' of candidate 1 is inf"),
        ("timestamps", (0, 0), -5, "timestamp -5 is negative"),
        ("candidate_timestamps", (0, 0), -1, "candidate timestamp -1 is negative"),
        ("timestamps", (0, 6), 10**6, "timestamps fall after event 6"),
        ("labels", (0, 3, 1), float("nan"), "label 'love' of candidate 3 is nan"),
        ("labels", (0, 1, 0), 5, "label 'like' of candidate 1 is 5.0: known labels lie in"),
        ("labels", (0, 0, 0), -1, "label 'like' of candidate 0 is -1.0.*label_mask"),
    ]:
        wrong = {**batch, name: batch[name].clone()}
        wrong[name][at] = value
        with pytest.raises(ValueError, match=message):
            model(**wrong)
    unknown = {**batch, "labels": batch["labels"].clone(), "label_mask": batch["label_mask"].clone()}
    unknown["labels"][0, 0, 0], unknown["label_mask"][0, 0, 0] = -1, False  # as a collator gives it
    model(**unknown)
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


def test_each_dropout_of_a_model_has_its_own_mask(model, batch, monkeypatch):
    """A site of its own, and a key of its own for every token."""
    module, drawn = sys.modules[type(model).__module__], []

    def record(x, p, token_keys, site):
        drawn.append((len(x), token_keys, site))
        return keyed_dropout(x, p, token_keys, site)

    monkeypatch.setattr(module, "keyed_dropout", record)
    with torch.no_grad():
        model(**batch)
    sites = [site for _, _, site in drawn]
    assert len(sites) >= len(model.model.layers) and len(set(sites)) == len(sites)
    for rows, keys, _ in drawn:
        assert len(keys.unique()) == rows == len(keys)


def test_unknown_attention(model):
    with pytest.raises(ValueError, match="attn_implementation='fast' is not available for .*ForRanking; choose from"):
        model.set_attn_implementation("fast")


def test_dlrm_has_no_attention_to_choose(ranking_model):
    with pytest.raises(ValueError, match=r"'eager' is not available for DLRMForRanking; choose from \['auto'\]"):
        ranking_model(DLRMForRanking, DLRMConfig).set_attn_implementation("eager")


def test_score_knows_its_arguments(model, batch):
    """A misspelt mask would change scores without a word."""
    model.score(**batch, user_ids=torch.arange(2))
    with pytest.raises(ValueError, match="no field 'attn_mask': did you mean attention_mask"):
        model.score(**batch, attn_mask=torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"no field 'position_ids'"):
        model.score(**batch, position_ids=torch.ones(1, 8))


def test_outputs_that_no_ranking_model_records_are_said(model, batch):
    with pytest.warns(UserWarning, match="output_hidden_states has no effect"):
        model(**batch, output_hidden_states=True)
    with pytest.warns(UserWarning, match="output_attentions has no effect"):
        model(**batch, output_attentions=True)
    model.config.output_hidden_states = True
    with pytest.warns(UserWarning, match="output_hidden_states has no effect"):
        model(**batch)


def test_gradient_checkpointing_is_on_or_refused(ranking_model, ranking, caplog):
    """No flag without layers that follow it, and no word of gradients that cannot flow: they do."""
    dlrm = ranking_model(DLRMForRanking, DLRMConfig)
    with pytest.raises(ValueError, match="does not support"):
        dlrm.activation_checkpointing_enable()
    assert not dlrm.is_activation_checkpointing
    batch = ranking.make_ranking_batch([5, 3], [2, 4])
    for name in ("mtgr", "dlrm_hstu"):
        model = ranking_model(*MODELS[name])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.activation_checkpointing_enable({"use_reentrant": True})
        model.model.features.requires_grad_(False)
        rows = model.embeddings(model.embedding_ids(batch), insert=False)  # rows of a frozen table
        model(**batch, embeddings={name: x.detach() for name, x in rows.items()}).loss.backward()
        assert model.model.layers[0].o_proj.weight.grad.abs().sum() > 0
        model.disable_input_require_grads()
    assert "Gradients cannot flow" not in caplog.text


@pytest.mark.parametrize("config", [config for _, config in MODELS.values()])
def test_impossible_configurations(config):
    for fields, message in [({"tasks": []}, r"tasks is \[\]"), ({"num_recent": -1}, "num_recent must be at least 0")]:
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            config(**fields)
    assert config().tasks == ["click"] and config().num_recent is None


@pytest.mark.parametrize("later", [0, 3])
def test_num_recent_of_the_config_is_the_default(later, model, ranking):
    """Counted before the user's first candidate, as windows are cut; a batch that brings its own overrides it."""
    model.config.num_recent = 2
    batch = ranking.make_ranking_batch([5, 1, 0, 9], [2, 1, 1, 0])
    batch["timestamps"] = torch.tensor([[1, 2, 3, 4, 5, 6, *range(11, 20)]])
    batch["candidate_timestamps"] = torch.tensor([[6 - later, 9, 10, 10]])  # `later` events are not before user 0's
    counts = {"num_recent": torch.tensor([2 + later, 1, 0, 2])}
    without = {name: x for name, x in batch.items() if name != "num_recent"}
    given = RankingBatch.from_fields({**without, **counts}, model.config)
    assert torch.equal(RankingBatch.from_fields(without, model.config).is_recent, given.is_recent)
    assert torch.equal(model.score(**without), model.score(**without, **counts))
    all_recent = {"num_recent": torch.tensor([5, 1, 0, 9])}
    assert RankingBatch.from_fields({**without, **all_recent}, model.config).is_recent.all()
    model.config.num_recent = None
    assert RankingBatch.from_fields(without, model.config).is_recent.all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "attention"),
    [("mtgr", "auto"), ("mtgr", "eager"), ("dlrm_hstu", "auto"), ("dlrm_hstu", "eager"), ("dlrm", "auto")],
)
def test_a_compiled_ranking_model_takes_the_same_steps(kind, attention, ranking_model, ranking):
    model, batch = ranking_model(*MODELS[kind]), ranking.make_ranking_batch([5, 3], [2, 1])
    model.set_attn_implementation(attention)
    want = ranking.ranking_step(model, [batch])
    torch.compiler.reset()
    model.compile()
    ranking.assert_same_step(ranking.ranking_step(model, [batch]), want)
