"""Law: a cost measured before training changes where samples are computed, not one loss of the run."""

import json
from pathlib import Path

import numpy as np
import pytest
from grzoo.data import EventDataset, GenRecCollator, UniformNegatives
from grzoo.models import HSTUConfig, HSTUForRetrieval
from grzoo.recipes.calibration import measure
from grzoo.recipes.runtime import Runtime, UserError
from grzoo.recipes.train import main

MICRO = (
    "--data.num_users 60 --data.num_items 40 --data.mean_length 8 --max_length 12 --global_batch_size 20 "
    "--num_negatives 8 --model.hidden_size 8 --model.attention_head_dim 4 --model.linear_head_dim 4 "
    "--model.num_hidden_layers 1 --use_cpu --backend naive --logging_steps 1 --max_steps 4 --save_strategy no "
    "--micro_batches 2 --top_k 5"
).split()


def losses(folder: Path, *more: str) -> list[float]:
    main(Runtime(0, 0, 1, 1), [*MICRO, "--output_dir", str(folder), "--dataset_dir", str(folder.parent / "d"), *more])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_a_run_balanced_by_measured_time_has_the_same_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = losses(tmp_path / "plain")
    workers = "--dataloader_num_workers 1 --dataloader_prefetch_factor 3 --dataloader_pin_memory False".split()
    measured = losses(tmp_path / "measured", "--calibrate_cost", *workers)
    assert measured == pytest.approx(plain, rel=1e-5) and len(plain) == 4
    assert "measured: " in capsys.readouterr().out


def test_settings_without_effect_and_models_without_measurement_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses(tmp_path / "a", "--dataloader_prefetch_factor", "3")
    assert "prefetch_factor has no effect with --dataloader_num_workers 0" in capsys.readouterr().out
    with pytest.raises(UserError, match="dataloader_prefetch_factor must be positive, got 0"):
        losses(tmp_path / "b", "--dataloader_prefetch_factor", "0")


@pytest.mark.parametrize("longest", [1, 2, 64])
def test_the_model_is_timed_at_any_length(longest: int) -> None:
    config = HSTUConfig(
        hidden_size=8,
        attention_head_dim=4,
        linear_head_dim=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_sequence_length=64,
        max_position_embeddings=75,
        num_negatives=4,
    )
    model = HSTUForRetrieval(config)

    def collate(dataset: EventDataset) -> GenRecCollator:
        return GenRecCollator(dataset, max_length=64, negatives=UniformNegatives(np.arange(1, 30), 4))

    cost = measure(model, collate, np.arange(1, 30), longest)
    assert cost(np.array([longest]))[0] > 0 and cost.linear >= 0 and cost.quadratic >= 0
    assert all(parameter.grad is None for parameter in model.parameters())
