"""All settings of a training run, read once from `--config` and the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .arguments import (
    CommonArguments,
    DataArguments,
    EvaluationArguments,
    OptimizerArguments,
    StepArguments,
    TrainingArguments,
)
from .parsing import parse
from .runtime import UserError

_CLASSES = [CommonArguments, DataArguments, EvaluationArguments, OptimizerArguments, StepArguments, TrainingArguments]
_POSITIVE = (
    "global_batch_size",
    "max_length",
    "num_negatives",
    "logging_steps",
    "eval_steps",
    "eval_epochs",
    "eval_batch_size",
    "save_steps",
    "dataloader_prefetch_factor",
    "epochs_per_period",
    "walk_periods",
    "early_stopping_patience",
    "max_tokens_per_device",
    "micro_batches",
    "num_train_epochs",
    "learning_rate",
)


@dataclass
class Settings:
    """The argument groups and the free sections `model:` and `data:`."""

    common: CommonArguments
    data: DataArguments
    evaluation: EvaluationArguments
    optimizer: OptimizerArguments
    step: StepArguments
    training: TrainingArguments
    model_options: dict[str, Any]
    data_options: dict[str, Any]
    more: tuple[Any, ...] = ()


def read_settings(argv: Sequence[str], *more: type) -> Settings:
    """Parses and checks the settings of a training run.

    Args:
        more: argument classes that a recipe has besides; their values are `Settings.more`.

    Raises:
        UserError: unknown, malformed or impossible settings.
    """
    values, sections = parse([*_CLASSES, *more], argv)
    common, data, evaluation, optimizer, step, training = values[: len(_CLASSES)]
    options = {"model_options": sections["model"], "data_options": sections["data"]}
    settings = Settings(
        common, data, evaluation, optimizer, step, training, **options, more=tuple(values[len(_CLASSES) :])
    )
    for group in values:
        for name in _POSITIVE:
            value = getattr(group, name, None)
            if value is not None and value <= 0:
                raise UserError(f"--{name} must be positive, got {value}")
    if not settings.training.output_dir:
        raise UserError("give --output_dir, the folder for metrics, checkpoints and the export")
    if min(settings.evaluation.top_k) < 1:
        raise UserError(f"--top_k takes cutoffs from 1, got {settings.evaluation.top_k}")
    _check_sparse(settings.optimizer)
    return settings


def _check_sparse(optimizer: OptimizerArguments) -> None:
    if optimizer.sparse_weight_decay and optimizer.sparse_optimizer in ("adagrad", "rowwise_adagrad"):
        raise UserError(
            f"--sparse_weight_decay {optimizer.sparse_weight_decay} has no effect on --sparse_optimizer "
            f"{optimizer.sparse_optimizer}: use adamw or sgd, or leave it at 0"
        )
