"""Reads a DeepSpeed configuration and makes of it one that the engine can keep its word on."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .supported import CLIENT_OPTIMIZERS, CONFIG_OPTIMIZERS, ZERO_KNOWS, refuse_unsupported


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """A checked DeepSpeed configuration.

    Attributes:
        deepspeed: the complete dictionary handed to DeepSpeed.
        notes: one sentence for every value that the engine set because the user had not.
        stage: ZeRO stage, 1 to 3.
        dtype: "fp32" or "bf16", the precision of the dense weights in forward and backward.
    """

    deepspeed: dict[str, Any]
    notes: tuple[str, ...]
    stage: int
    dtype: str


def resolve_config(
    config: Mapping[str, Any] | str | Path,
    *,
    world_size: int,
    optimizer: str | None = None,
    has_scheduler: bool = False,
) -> EngineConfig:
    """Checks a DeepSpeed configuration and fills in what the engine decides.

    Args:
        config: a dictionary, or the path of a JSON file; never modified.
        world_size: number of data-parallel ranks.
        optimizer: class name of the torch optimizer that the caller passes; then no "optimizer" section may be given.
        has_scheduler: the caller passes a scheduler; then no "scheduler" section may be given.

    Raises:
        ValueError: an unresolved "auto", a contradiction, or something that the engine does not support; the message
            names the key, its value and the remedy.
    """
    resolved = read_config(config)
    _refuse_auto(resolved)
    refuse_unsupported(resolved)
    notes: list[str] = []
    _resolve_batch_sizes(resolved, world_size, notes)
    _resolve_clipping(resolved, notes)
    _resolve_optimizer(resolved, optimizer, notes)
    if has_scheduler and "scheduler" in resolved:
        raise ValueError('both lr_scheduler= and a "scheduler" section are given: remove one of them')
    resolved["gradient_accumulation_steps"] = 1
    resolved.setdefault("steps_per_print", 2**31)  # the recipes report progress themselves
    bf16 = bool(resolved.get("bf16", {}).get("enabled", False))
    stage = int(resolved["zero_optimization"]["stage"])
    return EngineConfig(deepspeed=resolved, notes=tuple(notes), stage=stage, dtype="bf16" if bf16 else "fp32")


def read_config(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A deep copy of a configuration dictionary, or the contents of a JSON file."""
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    if not isinstance(config, (str, Path)):
        raise ValueError(f"config is a {type(config).__name__}: pass a dictionary or the path of a DeepSpeed JSON file")
    path = Path(config)
    if not path.is_file():
        raise ValueError(f"DeepSpeed configuration {str(path)!r} does not exist: pass a dictionary or an existing file")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise ValueError(f"DeepSpeed configuration {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"DeepSpeed configuration {str(path)!r} holds a {type(contents).__name__}, not an object")
    return contents


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"the key {repeated[0]!r} appears twice")
    return dict(pairs)


def _refuse_auto(config: dict[str, Any]) -> None:
    paths = [path for path, value in _leaves(config, "") if isinstance(value, str) and value.lower() == "auto"]
    if paths:
        raise ValueError(
            f'unresolved "auto" in the DeepSpeed configuration at {", ".join(paths)}: only the transformers Trainer '
            "fills these in; write a value, or remove the key to get the default"
        )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from _leaves(child, f"{path}[{index}]")
    else:
        yield path, value


def _resolve_batch_sizes(config: dict[str, Any], world_size: int, notes: list[str]) -> None:
    total, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
    for key, value in (("train_batch_size", total), ("train_micro_batch_size_per_gpu", micro)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{key} is {value!r}: it must be a positive integer, or be removed")
    if total is not None and total % world_size:
        raise ValueError(
            f"train_batch_size {total} is not a multiple of the {world_size} ranks: change it or remove it"
        )
    if total is not None and micro is not None and total != micro * world_size:
        raise ValueError(
            f"train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x {world_size} ranks (the engine "
            "accumulates by itself, so that DeepSpeed's gradient_accumulation_steps is 1): remove one of the two keys"
        )
    if total is None and micro is None:
        config["train_micro_batch_size_per_gpu"] = 1
        notes.append("train_micro_batch_size_per_gpu set to 1: the sizes of the batches come with each step")


def _resolve_clipping(config: dict[str, Any], notes: list[str]) -> None:
    clipping = config.setdefault("gradient_clipping", None)
    if clipping is None:
        config["gradient_clipping"] = 0.0
        notes.append("gradient_clipping set to 0.0 (off): it was not given, and DeepSpeed would silently clip at 1.0")
    elif isinstance(clipping, bool) or not isinstance(clipping, (int, float)) or not 0 <= clipping < float("inf"):
        raise ValueError(f"gradient_clipping is {clipping!r}: give a norm, or 0.0 to switch clipping off")


def _resolve_optimizer(config: dict[str, Any], client: str | None, notes: list[str]) -> None:
    if client is not None:
        if "optimizer" in config:
            raise ValueError('both optimizer= and an "optimizer" section are given: remove one of them')
        _allow_in_zero(config, client)
        return
    section = config.get("optimizer", {})
    if not isinstance(section.get("type"), str):
        raise ValueError(
            'no dense optimizer: pass optimizer=, or add {"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}} to '
            "the DeepSpeed configuration"
        )
    name = section["type"] = CONFIG_OPTIMIZERS[section["type"].lower()]
    params = section.setdefault("params", {})
    if name in ("Adam", "AdamW") and "torch_adam" not in params:
        params["torch_adam"] = True
        notes.append("optimizer.params.torch_adam set to true: DeepSpeed's own Adam is compiled at its first use")
    _allow_in_zero(config, name)


def _allow_in_zero(config: dict[str, Any], name: str) -> None:
    """DeepSpeed wants a confirmation for optimizers it has not tested under ZeRO; element-wise ones are safe."""
    if name in ZERO_KNOWS:
        return
    if name in CLIENT_OPTIMIZERS:
        config.setdefault("zero_allow_untested_optimizer", True)
    if not config.get("zero_allow_untested_optimizer", False):
        raise ValueError(
            f"optimizer {name} is not known to work on ZeRO's flat partitions: use one of "
            f"{', '.join(CLIENT_OPTIMIZERS)}, or, if it treats every element alike, set "
            "zero_allow_untested_optimizer to true"
        )
