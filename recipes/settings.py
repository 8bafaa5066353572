"""All settings of a training run, read once from `--config` and the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from grzoo.data.prepare import PrepareConfig

from .arguments import (
    CommonArguments,
    DataArguments,
    EvaluationArguments,
    OptimizerArguments,
    StepArguments,
    TrainingArguments,
)
from .dataset_folder import RECIPE_OWNED
from .metrics_log import check_tracker
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
    "sparse_learning_rate",
    "adam_epsilon",
    "max_candidates",
    "shuffle_block_size",
)
_NOT_NEGATIVE = (
    "warmup_steps",
    "weight_decay",
    "sparse_weight_decay",
    "max_grad_norm",
    "save_total_limit",
    "early_stopping_threshold",
    "num_recent",
    "dataloader_num_workers",
)
_BELOW_ONE = ("adam_beta1", "adam_beta2")


_ABOUT = (
    "Hyperparameters of the model are --model.NAME VALUE, or stand below model: in the YAML; its configuration class "
    "names them. How the log is prepared is --data.NAME VALUE, or stands below data:; prepare_data.py --help explains: "
    f"{', '.join(f.name for f in fields(PrepareConfig) if f.name not in RECIPE_OWNED)}."
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
    values, sections = parse([*_CLASSES, *more], argv, about=_ABOUT)
    common, data, evaluation, optimizer, step, training = values[: len(_CLASSES)]
    options = {"model_options": sections["model"], "data_options": sections["data"]}
    settings = Settings(
        common, data, evaluation, optimizer, step, training, **options, more=tuple(values[len(_CLASSES) :])
    )
    check_numbers(values)
    if not settings.training.output_dir:
        raise UserError("give --output_dir, the folder for metrics, checkpoints and the export")
    check_tracker(settings.training.report_to)
    _check_sparse(settings.optimizer)
    return settings


def check_numbers(groups: Sequence[Any]) -> None:
    """Raises UserError for a number of an argument group that is out of its range."""
    for group in groups:
        for name in _POSITIVE:
            value = getattr(group, name, None)
            if value is not None and not value > 0:
                raise UserError(f"--{name} must be positive, got {value}")
        for name in _NOT_NEGATIVE:
            value = getattr(group, name, None)
            if value is not None and not value >= 0:
                raise UserError(f"--{name} must not be negative, got {value}")
        for name in _BELOW_ONE:
            value = getattr(group, name, None)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"--{name} must be at least 0 and below 1, got {value}")
        cutoffs = getattr(group, "top_k", 1)
        if min(cutoffs if isinstance(cutoffs, list) else [cutoffs]) < 1:
            raise UserError(f"--top_k takes numbers from 1, got {cutoffs}")


def _check_sparse(optimizer: OptimizerArguments) -> None:
    if optimizer.sparse_weight_decay and optimizer.sparse_optimizer in ("adagrad", "rowwise_adagrad"):
        raise UserError(
            f"--sparse_weight_decay {optimizer.sparse_weight_decay} has no effect on --sparse_optimizer "
            f"{optimizer.sparse_optimizer}: use adamw or sgd, or leave it at 0"
        )
