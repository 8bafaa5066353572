"""Settings that the other settings of a run leave without effect: said, so that nobody waits for what they do."""

from typing import Any

from .ranking import is_ranking
from .settings import Settings


def without_effect(settings: Settings) -> list[str]:
    """A line for each setting that differs from its default and is not read."""
    data, step, optimizer, training = settings.data, settings.step, settings.optimizer, settings.training
    if is_ranking(settings.model_options.get("model_type")):
        lines = _idle(data, "a ranking model", "windows", "window_overlap", "stochastic_alpha", "shuffle_block_size")
        lines += _idle(step, "a ranking model", "negative_sampling", "num_negatives")
        lines += _idle(settings.evaluation, "a ranking model", "top_k", "exclude_seen")
    else:
        lines = _idle(data, "a retrieval model", "max_candidates", "num_recent")
        windows = [("window_overlap", "sliding"), ("stochastic_alpha", "stochastic")]
        lines += _idle(data, f"--windows {data.windows}", *(name for name, kind in windows if data.windows != kind))
        if step.negative_sampling == "all":
            lines += _idle(step, "--negative_sampling all", "num_negatives")
    if not data.dataloader_num_workers:
        lines += _idle(data, "--dataloader_num_workers 0", "dataloader_prefetch_factor")
    if optimizer.lr_scheduler_type == "constant":
        lines += _idle(optimizer, "--lr_scheduler_type constant (constant_with_warmup has one)", "warmup_steps")
    intervals = [("eval_steps", "steps"), ("eval_epochs", "epoch")]
    idle = [name for name, strategy in intervals if training.eval_strategy != strategy]
    lines += _idle(training, f"--eval_strategy {training.eval_strategy}", *idle)
    saving = training.save_strategy
    idle = ["save_steps"] if saving != "steps" else []
    idle += ["save_total_limit"] if saving == "no" else []
    return lines + _idle(training, f"--save_strategy {saving}", *idle)


def _idle(group: Any, beside: str, *names: str) -> list[str]:
    fresh = type(group)()
    changed = [name for name in names if getattr(group, name) != getattr(fresh, name)]
    return [f"--{name} has no effect with {beside}" for name in changed]
