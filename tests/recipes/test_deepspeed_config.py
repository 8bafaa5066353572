"""Law: dtype, batch sizes, clipping and the dense optimizer have one source, the recipe."""

import json
from pathlib import Path

import pytest
from grzoo.recipes.arguments import OptimizerArguments, StepArguments
from grzoo.recipes.deepspeed_config import resolve
from grzoo.recipes.runtime import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def resolved(tmp_path):
    def write_and_resolve(config, world=2, optimizer=None, **step):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(config))
        return resolve(str(path), StepArguments(**step), optimizer or OptimizerArguments(), world)

    return write_and_resolve


def test_recipe_fills_what_it_owns(resolved):
    params = {"lr": "auto"}
    given = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}, "optimizer": {"params": params}}
    engine = resolved(given, world=3, bf16=True, optimizer=OptimizerArguments(learning_rate=0.5, max_grad_norm=2.0))
    config = engine.deepspeed
    assert (engine.stage, engine.dtype, config["gradient_clipping"]) == (2, "bf16", 2.0)
    expected = {"lr": 0.5, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True}
    assert config["optimizer"] == {"type": "AdamW", "params": expected}
    micro, steps = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    assert config["train_batch_size"] == micro * steps * 3


def test_equal_values_are_accepted(resolved):
    same = {"train_batch_size": 64, "gradient_clipping": 0.0, "bf16": {"enabled": False}}
    assert resolved({"zero_optimization": {"stage": 1}, **same}, global_batch_size=64).dtype == "fp32"


@pytest.mark.parametrize(
    ("config", "step", "parts"),
    [
        ({"train_batch_size": 64}, {}, ["train_batch_size is 64", "128", "--global_batch_size"]),
        ({"bf16": {"enabled": True}}, {}, ["bf16.enabled is True", "--bf16"]),
        ({"bf16": True}, {}, ["bf16 is True", "object"]),
        ({"fp16": {"enabled": True}}, {}, ["fp16.enabled is true", "bf16"]),
        ({"gradient_clipping": 1.0}, {}, ["gradient_clipping is 1.0", "--max_grad_norm"]),
        ({"gradient_accumulation_steps": 4}, {}, ["gradient_accumulation_steps is 4", "--micro_batches"]),
        ({"train_micro_batch_size_per_gpu": 4}, {}, ["micro_batch_size_per_gpu is 4", "--max_tokens_per_device"]),
        ({"optimizer": {"type": "Lamb"}}, {}, ["'Lamb'", "'AdamW'"]),
        ({"optimizer": "AdamW"}, {}, ["optimizer is 'AdamW'", "object"]),
        ({"optimizer": {"params": {"lr": 3.0}}}, {}, ["optimizer.params.lr is 3.0", "--learning_rate"]),
        ({"scheduler": {"type": "WarmupLR"}}, {}, ["'scheduler'", "--lr_scheduler_type"]),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, {}, ["reduce_bucket_size", '"auto"']),
        ({"zero_optimization": {"stage": 0}}, {}, ["stage is 0"]),
    ],
)
def test_contradictions_name_both_sides(resolved, config, step, parts):
    config = {"zero_optimization": {"stage": 1}, **config}
    with pytest.raises((UserError, ValueError)) as error:
        resolved(config, **step)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(("text", "part"), [(None, "does not exist"), ("{", "not valid JSON"), ("[]", "not an object")])
def test_unreadable_files(tmp_path, text, part):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=part):
        resolve(str(path), StepArguments(), OptimizerArguments(), 1)


def test_default_and_shipped_files():
    assert resolve(None, StepArguments(), OptimizerArguments(), 1).stage == 1
    for stage in (1, 2, 3):
        path = ROOT / "ds_configs" / f"zero{stage}.json"
        assert resolve(str(path), StepArguments(bf16=True), OptimizerArguments(), 3).stage == stage
