"""How many steps a run has, and that it never ends without a checkpoint."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from grzoo.recipes.arguments import TrainingArguments
from grzoo.recipes.best_model import BestModel
from grzoo.recipes.metrics_log import MetricsLog
from grzoo.recipes.runtime import Runtime
from grzoo.recipes.training import TrainingLoop, total_steps


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 10), (1.1, 11), (1.11, 12), (0.05, 1)], ids=["whole", "inexact", "up", "least"]
)
def test_epochs_are_rounded_up_to_steps(epochs, steps):
    assert total_steps(TrainingArguments(num_train_epochs=epochs), 10) == steps


class Engine:
    """Trains nothing; notes what is saved."""

    def __init__(self):
        self.exchange = SimpleNamespace(sum_int=lambda value: value)
        self.collection = SimpleNamespace(statistics=dict)
        self.saved = []

    def train_batch(self, step):
        return SimpleNamespace(
            applied=True, loss=1.0, seconds={}, learning_rate=0.1, grad_norm=1.0, sparse_grad_norm=1.0, statistics={}
        )

    def save_checkpoint(self, folder, tag, client_state):
        self.saved.append(tag)
        return folder / tag


class Loader:
    """Three steps, an epoch."""

    sampler = SimpleNamespace(rows_per_epoch=3)

    def __iter__(self):
        for number in range(3):
            yield SimpleNamespace(num_tokens=1, num_users=1, epoch=0, end=(0, (number + 1) % 3))

    def state_dict(self):
        return {"epoch": 0, "cursor": 0}


@pytest.mark.parametrize(
    ("values", "lost", "saved"),
    [
        ([0.1, 0.3, 0.2], False, ["checkpoint-1", "checkpoint-2"]),
        ([math.nan] * 3, False, ["checkpoint-3"]),
        ([0.1, 0.1, 0.1], True, ["checkpoint-3"]),
    ],
    ids=["best", "never finite", "best of before is lost"],
)
def test_a_run_that_saves_the_best_ends_with_a_checkpoint(tmp_path: Path, values, lost, saved):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), save_strategy="best", eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    best = BestModel("mrr", keeps=True)
    if lost:
        best.step, best.value = 0, 0.9
    engine, log, left = Engine(), MetricsLog(None), iter(values)
    evaluate = lambda: {"mrr": next(left)}  # noqa: E731
    runtime = Runtime(0, 0, 1, 1)
    loop = TrainingLoop(
        engine, Loader(), arguments, log, runtime, total_steps=3, evaluate=evaluate, identity={}, best=best
    )
    loop.run()
    assert engine.saved == saved
