"""The best evaluation of a run: which checkpoint it left, and when training stops because nothing better comes."""

import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grzoo.embeddings.engine.folder import is_sealed

from .arguments import TrainingArguments
from .runtime import UserError

_LOWER_IS_BETTER = ("logloss", "ne")


@dataclass
class BestModel:
    """Follows one metric of the evaluations, as transformers' Trainer with its EarlyStoppingCallback does.

    Args:
        metric: name of the metric, as the evaluator gives it.
        keeps: the checkpoint of the best evaluation is kept, and loaded at the end.
        patience: stop after so many evaluations without one that is better; None: never.
        threshold: by how much an evaluation must be better to end the waiting.
    """

    metric: str
    keeps: bool
    patience: int | None = None
    threshold: float = 0.0
    step: int | None = None
    epoch: float = 0.0
    value: float = math.nan
    waited: int = 0
    checkpoint: Path | None = None

    @property
    def is_out_of_patience(self) -> bool:
        """Whether training should stop."""
        return self.patience is not None and self.waited >= self.patience

    def update(self, step: int, epoch: float, metrics: dict[str, float]) -> bool:
        """Takes note of an evaluation; returns whether it is the best so far. A value that is not finite never is."""
        value = metrics[self.metric]
        better = self._is_better(value)
        enough = better and (self.step is None or abs(value - self.value) > self.threshold)
        self.waited = 0 if enough else self.waited + 1
        if better:
            self.step, self.epoch, self.value, self.checkpoint = step, epoch, value, None
        return better

    def _is_better(self, value: float) -> bool:
        better = operator.lt if self.metric.rpartition("/")[2] in _LOWER_IS_BETTER else operator.gt
        return math.isfinite(value) and (self.step is None or better(value, self.value))

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        value = None if self.step is None else self.value
        state = {"metric": self.metric, "step": self.step, "epoch": self.epoch, "value": value, "waited": self.waited}
        return state | {"checkpoint": str(self.checkpoint) if self.checkpoint else None}

    def load_state_dict(self, state: dict[str, Any], resumed_from: Path, step: int) -> None:
        """Goes on from the state in `resumed_from`, the checkpoint of `step`; its own evaluation may be the best."""
        if state.get("metric") != self.metric:
            followed = state.get("metric", "no metric")
            warnings.warn(f"the run followed {followed} so far: {self.metric} counts from here on", stacklevel=2)
            return
        self.step, self.epoch, self.waited = state["step"], state["epoch"], state["waited"]
        self.value = math.nan if state["value"] is None else state["value"]
        if not self.keeps or self.step is None:
            return
        # Beside it before where it was: the folder may have moved.
        wanted = [resumed_from if self.step == step else resumed_from.parent / f"checkpoint-{self.step}"]
        wanted += [Path(state["checkpoint"])] if state["checkpoint"] else []
        self.checkpoint = next((path for path in wanted if is_sealed(path)), None)
        if self.checkpoint is None:
            warnings.warn(
                f"checkpoint-{self.step}, the best model so far, is missing or damaged: unless a better one comes, "
                "there is nothing to load at the end",
                stacklevel=2,
            )

    def metrics(self) -> dict[str, Any]:
        """What metrics.jsonl tells of the model that was chosen."""
        return {"best/step": self.step, "best/epoch": self.epoch, f"best/{self.metric}": self.value}

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4f} after step {self.step}, epoch {self.epoch:.2f}"


def build_best_model(arguments: TrainingArguments, split: str, names: Sequence[str]) -> BestModel | None:
    """What `--load_best_model_at_end` and `--early_stopping_patience` ask for; None when neither is set.

    Args:
        split: the one that is evaluated during training.
        names: metrics of its evaluator; the first decides when `metric_for_best_model` is not set.

    Raises:
        UserError: there is nothing to choose by, or the choice would be made on the test split.
    """
    keeps, patience = arguments.load_best_model_at_end, arguments.early_stopping_patience
    if arguments.save_strategy == "best" and not keeps:
        raise UserError("--save_strategy best saves what --load_best_model_at_end true loads: set it too")
    if not keeps and patience is None:
        for name in ("metric_for_best_model", "early_stopping_threshold"):
            if getattr(arguments, name):
                warnings.warn(f"--{name} has no effect without --load_best_model_at_end true", stacklevel=2)
        return None
    if patience is None and arguments.early_stopping_threshold:
        warnings.warn("--early_stopping_threshold has no effect without --early_stopping_patience", stacklevel=2)
    flag = "--load_best_model_at_end" if keeps else "--early_stopping_patience"
    if split != "validation":
        raise UserError(
            f"{flag} chooses by a validation split, and the data has none (choosing by the {split} split would spoil "
            "it): prepare the data with one (prepare_data.py --validation last; in a recipe that prepares it "
            "validation: last below data:)"
        )
    if arguments.eval_strategy == "no":
        raise UserError(f"{flag} needs evaluations: set --eval_strategy to epoch or steps")
    if keeps and arguments.save_strategy == "no":
        raise UserError(f"{flag} needs checkpoints: set --save_strategy best, which saves the best one only")
    if not keeps:
        warnings.warn("without --load_best_model_at_end true the last model is exported, not the best", stacklevel=2)
    metric = (arguments.metric_for_best_model or names[0]).removeprefix("eval/")
    if metric not in names:
        raise UserError(f"--metric_for_best_model {metric!r} is not evaluated; there is {', '.join(names)}")
    return BestModel(metric, keeps, patience, arguments.early_stopping_threshold)
