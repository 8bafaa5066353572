"""What a checkpoint holds besides tensors: counters, hyperparameters of both optimizers, schedulers."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .engine import GenRecEngine

logger = logging.getLogger(__name__)

_COUNTERS = ("global_steps", "skipped_steps", "global_samples")


def training_state(engine: "GenRecEngine") -> dict[str, Any]:
    """Everything that `restore_training_state` puts back, as JSON values."""
    deepspeed = engine.deepspeed
    return {
        "counters": {name: int(getattr(deepspeed, name)) for name in _COUNTERS},
        "written_by": {
            "world_size": engine.exchange.world_size,
            "zero_stage": engine.config.stage,
            "dtype": engine.config.dtype,
        },
        "optimizer": {"type": _name(deepspeed.optimizer.optimizer), "groups": _groups(deepspeed.optimizer)},
        "sparse_optimizer": {"type": _name(engine.sparse_optimizer), "groups": _groups(engine.sparse_optimizer)},
        "lr_scheduler": _scheduler_state(engine.lr_scheduler),
        "sparse_lr_scheduler": _scheduler_state(engine.sparse_lr_scheduler),
    }


def check_training_state(engine: "GenRecEngine", state: Mapping[str, Any], where: Path) -> None:
    """Raises ValueError, naming both sides, when the checkpoint was trained by other optimizers or schedulers."""
    ours = training_state(engine)
    for what in ("optimizer", "sparse_optimizer", "lr_scheduler", "sparse_lr_scheduler"):
        theirs, mine = _type(state.get(what)), _type(ours[what])
        if theirs != mine:
            raise ValueError(f"{what}: {where} was written with {theirs}, this engine has {mine}")
    for what in ("optimizer", "sparse_optimizer"):
        saved, present = len(state[what]["groups"]), len(ours[what]["groups"])
        if saved != present:
            raise ValueError(f"{what}: {where} has {saved} parameter groups, this engine has {present}")


def restore_training_state(engine: "GenRecEngine", state: Mapping[str, Any]) -> None:
    """Sets counters, hyperparameters and schedulers to those of a checkpoint; logs what was configured otherwise."""
    for name in _COUNTERS:
        setattr(engine.deepspeed, name, state["counters"][name])
    _restore_groups("optimizer", engine.deepspeed.optimizer, state["optimizer"]["groups"])
    _restore_groups("sparse_optimizer", engine.sparse_optimizer, state["sparse_optimizer"]["groups"])
    for name in ("lr_scheduler", "sparse_lr_scheduler"):
        if state[name] is not None:
            getattr(engine, name).load_state_dict(state[name]["state"])


def _name(value: Any) -> str:
    return type(value).__name__


def _type(entry: Mapping[str, Any] | None) -> str:
    return "none" if entry is None else str(entry["type"])


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """The hyperparameters of each parameter group that are JSON values."""
    return [
        {key: _plain(value) for key, value in group.items() if key != "params" and _is_plain(value)}
        for group in optimizer.param_groups
    ]


def _restore_groups(what: str, optimizer: Any, saved: list[dict[str, Any]]) -> None:
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        for key, value in values.items():
            configured = group.get(key)
            if _is_plain(configured) and _plain(configured) != value and key not in ("steps", "initial_lr"):
                logger.info("%s: %s continues as %s, not %s as configured", what, key, value, configured)
            group[key] = tuple(value) if isinstance(value, list) else value


def _scheduler_state(scheduler: Any) -> dict[str, Any] | None:
    if scheduler is None:
        return None
    return {"type": _name(scheduler), "state": _plain(scheduler.state_dict())}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str)) or isinstance(value, Tensor) and value.dim() == 0


def _plain(value: Any) -> Any:
    """JSON values: numbers for 0-dimensional tensors and numpy scalars, lists for tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
