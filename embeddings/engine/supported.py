"""What of a DeepSpeed configuration is supported; everything else is refused with its reason."""

import difflib
from typing import Any

# Optimizers that treat every element alike, by lower-case name: ZeRO cuts the flattened parameters anywhere.
CONFIG_OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "adagrad": "Adagrad", "sgd": "SGD", "rmsprop": "RMSprop"}
CLIENT_OPTIMIZERS = (*CONFIG_OPTIMIZERS.values(), "Adadelta", "Adamax", "NAdam", "RAdam")
ZERO_KNOWS = ("Adam", "AdamW", "Adagrad")  # the others need DeepSpeed's zero_allow_untested_optimizer

_SUPPORTED_KEYS = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler gradient_clipping "
    "zero_optimization bf16 fp16 data_types communication_data_type zero_allow_untested_optimizer "
    "steps_per_print wall_clock_breakdown memory_breakdown dump_state timers "
    "tensorboard wandb csv_monitor comet comms_logger flops_profiler activation_checkpointing".split()
)

_REFUSED_ZERO_KEYS = {
    "offload_param": "parameter offload is not tested with the sparse side",
    "offload_optimizer": "optimizer offload is not tested with the sparse side",
    "cpu_offload": "optimizer offload is not tested with the sparse side",
    "cpu_offload_param": "parameter offload is not tested with the sparse side",
    "zenflow": "ZenFlow updates some parameters later than others, so that a step is not a function of its batch",
    "zero_quantized_weights": "quantised communication changes the result with the number of ranks",
    "zero_quantized_nontrainable_weights": "quantised communication changes the result with the number of ranks",
    "zero_quantized_gradients": "quantised communication changes the result with the number of ranks",
    "mics_shard_size": "MiCS is not tested with the sparse side",
}


def refuse_unsupported(config: dict[str, Any]) -> None:
    """Raises ValueError naming the first key that the engine does not support, why, and what to do instead."""
    _refuse_unknown_keys(config)
    _refuse_precision(config)
    _refuse_zero(config)
    _refuse_optimizer(config)
    if config.get("gradient_accumulation_steps", 1) != 1:
        raise ValueError(
            f"gradient_accumulation_steps is {config['gradient_accumulation_steps']!r}: the engine runs as many "
            "micro-batches as a step brings; remove the key (for a larger batch, raise the global batch size)"
        )


def _is_off(value: Any) -> bool:
    """True for what leaves a DeepSpeed feature switched off."""
    if isinstance(value, dict):
        return value.get("enabled") is False or value.get("device") in ("none", None) and "device" in value
    return value is None or value is False or value == 0


def _refuse_unknown_keys(config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key in _SUPPORTED_KEYS or _is_off(value):
            continue
        close = difflib.get_close_matches(key, _SUPPORTED_KEYS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"DeepSpeed key {key!r} is not supported by the grzoo engine{hint}: remove it")
    for key in ("optimizer", "scheduler", "zero_optimization", "bf16", "fp16", "data_types"):
        if key in config and not isinstance(config[key], dict):
            raise ValueError(f"DeepSpeed section {key!r} is {config[key]!r}: it must be an object")


def _refuse_precision(config: dict[str, Any]) -> None:
    if config.get("fp16", {}).get("enabled", False):
        raise ValueError(
            "fp16.enabled is true: loss scaling is not tested with the sparse side (and DeepSpeed's stage 0 scales "
            'fp16 wrongly); use {"bf16": {"enabled": true}} or fp32'
        )
    bf16 = config.get("bf16", {})
    if bf16.get("enabled", False) and bf16.get("check_grad_overflow", True) is False:
        raise ValueError("bf16.check_grad_overflow is false: non-finite gradients would be applied; remove the key")
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if bf16.get(key, False):
            raise ValueError(f"bf16.{key} is true: the engine keeps fp32 master weights and states; remove the key")
    accumulate = config.get("data_types", {}).get("grad_accum_dtype")
    if accumulate in ("fp16", "float16", "half"):
        raise ValueError(f"data_types.grad_accum_dtype is {accumulate!r}: use 'fp32' or remove the key")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage == 1 and bf16.get("enabled", False) and accumulate in ("fp32", "float32", "float"):
        raise ValueError(
            "ZeRO stage 1 with bf16 and data_types.grad_accum_dtype 'fp32' uses an optimizer of DeepSpeed in which a "
            "step cannot be held back when the sparse gradients overflow: use stage 2 (the same speed and less memory)"
        )


def _refuse_zero(config: dict[str, Any]) -> None:
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise ValueError(
            f"zero_optimization.stage is {stage!r}: supported are 1, 2 and 3; DeepSpeed's stage 0 applies non-finite "
            "gradients in fp32 and takes a phantom first step in bf16, and stage 1 costs nothing extra"
        )
    for key, reason in _REFUSED_ZERO_KEYS.items():
        if key in zero and not _is_off(zero[key]) and zero[key] != -1:
            raise ValueError(f"zero_optimization.{key} is {zero[key]!r}: {reason}; remove the key")
    if zero.get("zero_hpz_partition_size", 1) not in (0, 1):
        raise ValueError("zero_optimization.zero_hpz_partition_size: not tested with the sparse side; remove the key")
    if zero.get("compute_grad_norm", True) is False:
        raise ValueError("zero_optimization.compute_grad_norm is false: the engine reports the norm; remove the key")


def _refuse_optimizer(config: dict[str, Any]) -> None:
    if "optimizer" not in config:
        return
    name = config["optimizer"].get("type")
    if isinstance(name, str) and name.lower() not in CONFIG_OPTIMIZERS:
        raise ValueError(
            f"optimizer.type is {name!r}: supported are {', '.join(CONFIG_OPTIMIZERS.values())}; for another torch "
            "optimizer that treats every element alike pass optimizer="
        )
