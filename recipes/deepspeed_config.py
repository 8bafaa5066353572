"""One place for what DeepSpeed and the recipe both know: dtype, batch sizes, clipping and the dense optimizer.

The recipe fills these keys of the user's DeepSpeed JSON. A JSON may leave them out, say "auto", or say the same;
anything else is refused, because one of the two would be ignored silently.
"""

import copy
from typing import Any

from grzoo.embeddings.engine.config import EngineConfig, read_config, resolve_config

from .arguments import OptimizerArguments, StepArguments
from .runtime import UserError

DEFAULT: dict[str, Any] = {"zero_optimization": {"stage": 1}}


def resolve(path: str | None, step: StepArguments, optimizer: OptimizerArguments, world_size: int) -> EngineConfig:
    """Fills the keys that the recipe owns, refuses what contradicts it, and has the engine check the rest.

    Accumulation is the engine's (a step may have any number of micro-batches), so DeepSpeed accumulates nothing;
    `train_batch_size` in the JSON is compared with `global_batch_size` (users).

    Args:
        path: a DeepSpeed JSON; None: ZeRO stage 1.
        world_size: ranks of the job.

    Raises:
        UserError: the JSON contradicts the recipe; names the key, both values and the recipe's setting to use instead.
        ValueError: missing or broken file, a remaining "auto", something that the engine does not support.
    """
    config = copy.deepcopy(DEFAULT) if path is None else read_config(path)
    _require(config, ["train_batch_size"], step.global_batch_size, "--global_batch_size")
    _require(config, ["gradient_accumulation_steps"], step.micro_batches or 1, "--micro_batches")
    _require(config, ["train_micro_batch_size_per_gpu"], None, "--max_tokens_per_device, a budget in events")
    _require(config, ["gradient_clipping"], optimizer.max_grad_norm, "--max_grad_norm")
    _require(config, ["bf16", "enabled"], step.bf16, "--bf16")
    _require_optimizer(config, optimizer)
    if "scheduler" in config:
        raise UserError("the DeepSpeed JSON has a 'scheduler': set --lr_scheduler_type and --warmup_steps instead")
    config.update(train_batch_size=world_size, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    return resolve_config(config, world_size=world_size)


def _require_optimizer(config: dict[str, Any], optimizer: OptimizerArguments) -> None:
    block = config.setdefault("optimizer", {"type": "AdamW"})
    if not isinstance(block, dict):
        raise UserError(f"optimizer is {block!r} in the DeepSpeed JSON: it must be an object")
    kind = block.get("type", "AdamW")
    if kind != "AdamW":
        raise UserError(f"optimizer.type is {kind!r} in the DeepSpeed JSON; the recipes use 'AdamW'")
    block["type"] = kind
    betas = [optimizer.adam_beta1, optimizer.adam_beta2]
    _require(config, ["optimizer", "params", "lr"], optimizer.learning_rate, "--learning_rate")
    _require(config, ["optimizer", "params", "betas"], betas, "--adam_beta1 and --adam_beta2")
    _require(config, ["optimizer", "params", "eps"], optimizer.adam_epsilon, "--adam_epsilon")
    _require(config, ["optimizer", "params", "weight_decay"], optimizer.weight_decay, "--weight_decay")


def _require(config: dict[str, Any], path: list[str], wanted: Any, flag: str) -> None:
    for key in path[:-1]:
        config = config.setdefault(key, {})
        if not isinstance(config, dict):
            raise UserError(f"{key} is {config!r} in the DeepSpeed JSON: it must be an object")
    given = config.get(path[-1], "auto")
    if given == "auto":
        config[path[-1]] = wanted
    elif given != wanted:
        name, recipe = ".".join(path), "leaves it out" if wanted is None else f"has {wanted!r}"
        raise UserError(f"{name} is {given!r} in the DeepSpeed JSON but the recipe {recipe}: set it by {flag} alone")
