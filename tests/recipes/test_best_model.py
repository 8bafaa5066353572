"""Law: the best evaluation and the end of patience are those of transformers' Trainer and EarlyStoppingCallback."""

import json
import math

import pytest
from grzoo.recipes.arguments import TrainingArguments
from grzoo.recipes.best_model import BestModel, build_best_model
from grzoo.recipes.runtime import UserError
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

HISTORIES = [
    [0.1, 0.3, 0.2, 0.25, 0.29, 0.5, 0.5, 0.5, 0.5],
    [0.5, 0.4, 0.3, 0.2, 0.1],
    [0.1, 0.105, 0.109, 0.112, 0.2, 0.204, 0.206, 0.207],
    [math.nan, math.nan, 0.1, math.nan, 0.2],
    [math.nan] * 4,
]


class Reference:
    """What the Trainer does after an evaluation: the callback first, then the best metric."""

    def __init__(self, lower, patience, threshold):
        self.callback = EarlyStoppingCallback(patience, threshold)
        self.state, self.control, self.lower = TrainerState(), TrainerControl(), lower

        class Arguments:
            metric_for_best_model, greater_is_better = "eval_x", not lower

        self.arguments = Arguments()

    def update(self, step, value):
        self.callback.on_evaluate(self.arguments, self.state, self.control, {"eval_x": value})
        best = self.state.best_metric
        if math.isfinite(value) and (best is None or (value < best if self.lower else value > best)):
            self.state.best_metric, self.state.best_global_step = value, step


@pytest.mark.parametrize("metric", ["ndcg@10", "love/logloss", "ne"])
@pytest.mark.parametrize("threshold", [0.0, 0.01])
@pytest.mark.parametrize("values", HISTORIES, ids=range(len(HISTORIES)))
def test_as_the_trainer(metric, threshold, values):
    lower = metric != "ndcg@10"
    best = BestModel(metric, keeps=True, patience=3, threshold=threshold)
    reference = Reference(lower, 3, threshold)
    for step, value in enumerate(values, 1):
        value = -value if lower else value
        best.update(step, step / 2, {metric: value, "other": 0.0})
        if not math.isnan(values[0]):  # the callback takes a first NaN for the best there is
            reference.update(step, value)
            assert best.is_out_of_patience == reference.control.should_training_stop
            assert (best.step, best.value) == (reference.state.best_global_step, reference.state.best_metric)
        if best.is_out_of_patience:
            break
    finite = [value for value in values[:step] if math.isfinite(value)]
    assert best.step == (values.index(max(finite)) + 1 if finite else None)
    assert finite or best.is_out_of_patience


def test_without_patience_training_never_stops():
    best = BestModel("mrr", keeps=True)
    for step in range(1, 50):
        assert best.update(step, 0.0, {"mrr": 1.0 / step}) == (step == 1)
    assert not best.is_out_of_patience


def checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "COMPLETE.json").write_text(json.dumps({"format_version": 1, "step": 1, "files": {}}))
    return folder


def test_the_state_of_a_checkpoint_continues_the_following(tmp_path):
    """Saved before, at and after the best evaluation, and after the folder has moved."""
    best = BestModel("mrr", keeps=True, patience=2)
    best.update(1, 0.5, {"mrr": 0.3})
    at_best = json.loads(json.dumps(best.state_dict()))
    best.checkpoint = checkpoint(tmp_path / "out" / "checkpoint-1")
    best.update(2, 1.0, {"mrr": 0.2})
    later = json.loads(json.dumps(best.state_dict()))

    resumed = BestModel("mrr", keeps=True, patience=2)
    resumed.load_state_dict(at_best, best.checkpoint, 1)
    assert (resumed.step, resumed.value, resumed.waited, resumed.checkpoint) == (1, 0.3, 0, best.checkpoint)

    resumed = BestModel("mrr", keeps=True, patience=2)
    resumed.load_state_dict(later, tmp_path / "out" / "checkpoint-2", 2)
    assert resumed == best
    resumed.update(3, 1.5, {"mrr": 0.1})
    assert resumed.is_out_of_patience

    (tmp_path / "out").rename(tmp_path / "moved")
    resumed.load_state_dict(later, tmp_path / "moved" / "checkpoint-2", 2)
    assert resumed.checkpoint == tmp_path / "moved" / "checkpoint-1"
    with pytest.warns(UserWarning, match="checkpoint-1, the best model so far, is missing or damaged"):
        resumed.load_state_dict(later, tmp_path / "elsewhere" / "checkpoint-2", 2)
    assert resumed.checkpoint is None and resumed.step == 1


def test_a_best_that_was_never_saved_is_not_taken_for_the_checkpoint_that_tells_of_it(tmp_path):
    """It was followed for patience only."""
    waiting = BestModel("mrr", keeps=False, patience=5)
    waiting.update(1, 0.5, {"mrr": 0.3})
    waiting.update(2, 1.0, {"mrr": 0.2})
    resumed = BestModel("mrr", keeps=True)
    with pytest.warns(UserWarning, match="checkpoint-1, the best model so far, is missing"):
        resumed.load_state_dict(waiting.state_dict(), checkpoint(tmp_path / "checkpoint-2"), 2)
    assert resumed.checkpoint is None and resumed.step == 1


def test_a_best_that_is_lost_stays_lost_on_a_second_resume(tmp_path):
    best = BestModel("mrr", keeps=True)
    best.update(1, 0.5, {"mrr": 0.3})
    best.checkpoint = tmp_path / "checkpoint-1"  # nothing is there
    for step in (2, 3):
        resumed = BestModel("mrr", keeps=True)
        with pytest.warns(UserWarning, match="checkpoint-1, the best model so far, is missing"):
            resumed.load_state_dict(best.state_dict(), checkpoint(tmp_path / f"checkpoint-{step}"), step)
        assert resumed.checkpoint is None
        best = resumed


def test_another_metric_than_before_starts_anew(tmp_path):
    best = BestModel("mrr", keeps=True)
    with pytest.warns(UserWarning, match="followed ndcg@10 so far"):
        best.load_state_dict({"metric": "ndcg@10", "step": 3, "epoch": 1.0, "value": 0.9, "waited": 1}, tmp_path, 3)
    assert best.step is None and best.update(4, 1.0, {"mrr": 0.1})


def build(split="validation", **arguments):
    return build_best_model(TrainingArguments(**arguments), split, ["ndcg@10", "hr@5", "mrr"])


def test_what_is_asked_for_is_built():
    assert build() is None
    assert build(load_best_model_at_end=True).metric == "ndcg@10"
    asked = {"metric_for_best_model": "eval/mrr", "early_stopping_patience": 4, "early_stopping_threshold": 0.5}
    assert build(load_best_model_at_end=True, **asked) == BestModel("mrr", True, 4, 0.5)
    with pytest.warns(UserWarning, match="the last model is exported"):
        assert not build(early_stopping_patience=1).keeps


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"split": "test", "load_best_model_at_end": True}, "validation last"),
        ({"split": "test", "early_stopping_patience": 1}, "validation last"),
        ({"eval_strategy": "no", "load_best_model_at_end": True}, "--eval_strategy"),
        ({"save_strategy": "no", "load_best_model_at_end": True}, "--save_strategy best"),
        ({"save_strategy": "best"}, "--load_best_model_at_end"),
        ({"metric_for_best_model": "auc", "load_best_model_at_end": True}, "'auc' is not evaluated; there is ndcg@10"),
    ],
)
def test_impossible_choices_are_refused(arguments, part):
    with pytest.raises(UserError, match=part):
        build(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"metric_for_best_model": "mrr"},
        {"early_stopping_threshold": 0.1},
        {"early_stopping_threshold": 0.1, "load_best_model_at_end": True},
    ],
)
def test_settings_without_effect_are_told(arguments):
    with pytest.warns(UserWarning, match="no effect"):
        build(**arguments)
