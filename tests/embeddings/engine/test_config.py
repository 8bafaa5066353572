"""The engine keeps its word on a DeepSpeed configuration, or refuses it naming key, value and remedy."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from grzoo.embeddings.engine.config import read_config, resolve_config


def config(**changes: Any) -> dict[str, Any]:
    minimal = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    return {key: value for key, value in (minimal | changes).items() if value is not None}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_supported(stage: int, bf16: bool) -> None:
    given = config(zero_optimization={"stage": stage}, bf16={"enabled": bf16}, gradient_clipping=1.0)
    untouched = copy.deepcopy(given)
    resolved = resolve_config(given, world_size=4)
    assert (resolved.stage, resolved.dtype) == (stage, "bf16" if bf16 else "fp32")
    assert resolved.deepspeed["gradient_clipping"] == 1.0
    assert resolved.deepspeed["gradient_accumulation_steps"] == 1
    assert given == untouched, "the caller's dictionary was changed"


def test_says_what_it_sets() -> None:
    resolved = resolve_config(config(), world_size=2)
    notes = " ".join(resolved.notes)
    assert resolved.deepspeed["gradient_clipping"] == 0.0 and "gradient_clipping" in notes and "1.0" in notes
    assert resolved.deepspeed["optimizer"]["params"]["torch_adam"] is True and "torch_adam" in notes
    assert resolved.deepspeed["train_micro_batch_size_per_gpu"] == 1 and "train_micro_batch" in notes
    assert resolve_config(resolved.deepspeed, world_size=2).notes == (), "resolving again must change nothing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": "auto"}, r'"auto".*train_batch_size'),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, r"optimizer\.params\.lr"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, "auto"]}}}, r"optimizer\.params\.betas\[1\]"),
        ({"zero_optimization": None}, "stage is 0.*supported are 1, 2 and 3"),
        ({"zero_optimization": {"stage": 0}}, "stage is 0"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4"),
        ({"zero_optimization": {"stage": True}}, "stage is True"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm"),
        ({"zero_optimization": 2}, "must be an object"),
        ({"fp16": {"enabled": True}}, "fp16.*bf16"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "check_grad_overflow.*remove"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "use stage 2"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4.*remove the key"),
        ({"gradient_clipping": -1.0}, "gradient_clipping is -1.0"),
        ({"gradient_clipping": "1"}, "gradient_clipping is '1'"),
        ({"gradient_cliping": 1.0}, "gradient_cliping.*did you mean 'gradient_clipping'"),
        ({"managed_gradient_accumulation": True}, "managed_gradient_accumulation"),
        ({"elasticity": {"enabled": True}}, "elasticity"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning"),
        ({"train_batch_size": 7}, "7 is not a multiple of the 2 ranks"),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}, "8 is not .* 2 x 2 ranks"),
        ({"train_micro_batch_size_per_gpu": 0}, "positive integer"),
        ({"optimizer": None}, "no dense optimizer.*AdamW"),
        ({"optimizer": {"params": {"lr": 1.0}}}, "no dense optimizer"),
        ({"optimizer": {"type": "OneBitAdam"}}, "OneBitAdam.*supported are"),
        ({"optimizer": {"type": "Lamb"}}, "Lamb"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_config(config(**changes), world_size=2)


def test_off_is_not_refused() -> None:
    off = config(
        zero_optimization={"stage": 2, "offload_optimizer": {"device": "none"}, "cpu_offload": None},
        fp16={"enabled": False},
        elasticity={"enabled": False},
        amp=None,
    )
    resolve_config(off, world_size=1)


@pytest.mark.parametrize(("given", "name"), [("adamw", "AdamW"), ("sgd", "SGD"), ("RMSProp", "RMSprop")])
def test_optimizer_names(given: str, name: str) -> None:
    resolved = resolve_config(config(optimizer={"type": given, "params": {"lr": 0.1}}), world_size=1).deepspeed
    assert resolved["optimizer"]["type"] == name
    assert resolved.get("zero_allow_untested_optimizer", False) is (name not in ("Adam", "AdamW"))


def test_client_optimizer() -> None:
    with pytest.raises(ValueError, match="both optimizer="):
        resolve_config(config(), world_size=1, optimizer="AdamW")
    with pytest.raises(ValueError, match="Muon is not known to work.*zero_allow_untested_optimizer"):
        resolve_config(config(optimizer=None), world_size=1, optimizer="Muon")
    assert resolve_config(config(optimizer=None), world_size=1, optimizer="NAdam").deepspeed[
        "zero_allow_untested_optimizer"
    ]
    with pytest.raises(ValueError, match="both lr_scheduler="):
        resolve_config(config(scheduler={"type": "WarmupLR"}), world_size=1, has_scheduler=True)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config()))
    assert read_config(path) == read_config(str(path)) == config()
    with pytest.raises(ValueError, match="missing.json' does not exist"):
        read_config(tmp_path / "missing.json")
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "holds a list"),
        ('{"bf16": {}, "bf16": {}}', "'bf16' appears twice"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(path)
    with pytest.raises(ValueError, match="config is a int"):
        read_config(3)  # type: ignore[arg-type]
