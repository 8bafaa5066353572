"""Laws: every contestant trains the same global batch, each sample once; the figures are those of their definitions."""

import json

import numpy as np
import pytest
from grzoo.data.balancing import plan_micro_batches
from grzoo.recipes.benchmark import balanced_training
from grzoo.recipes.benchmark.balanced_training import Workload, build_dataset, build_model, collator_of, step_of
from grzoo.recipes.benchmark.balancing_cases import plan_random


def test_the_ranks_share_out_the_whole_batch_whatever_the_plan() -> None:
    workload = Workload("x", np.array([3, 5, 90, 7]), users=8, steps=1)
    dataset = build_dataset(workload)
    collator = collator_of(dataset, workload.longest)
    rows = np.arange(8)
    lengths = collator.samples(rows).num_inputs
    cost = build_model(workload.longest).flops(lengths)
    for plan in (plan_random(lengths, 2, 1), plan_micro_batches(cost, lengths, 2)):
        steps = [step_of(collator, rows, 3, rank, plan) for rank in range(2)]
        keys = sorted(key for step in steps for key in step.micro_batches[0]["token_keys"][0].tolist())
        assert len(keys) == lengths.sum() == steps[0].num_tokens == steps[0].num_items_in_batch
        assert steps[0].num_items_in_batch == steps[1].num_items_in_batch
    users = [
        step_of(collator, rows, 3, rank, plan_random(lengths, 2, 1)).micro_batches[0]["user_ids"] for rank in (0, 1)
    ]
    assert [len(part) for part in users] == [4, 4]


def test_figures_of_two_steps_by_hand() -> None:
    workload = Workload("x", np.array([10, 20]), users=4, steps=2)
    seconds = {"random": [9.0, 2.0, 4.0], "balanced": [9.0, 1.0, 2.0]}
    losses = {"random": [3.0, 2.0, 1.0], "balanced": [3.0, 2.0, 1.001]}
    slowest = {name: [{"balanced": x, "measured": 1.0} for x in each] for name, each in seconds.items()}
    slowest["balanced"] = [{"balanced": 1.5, "measured": 1.0}] * 3
    row = balanced_training._row(
        workload, "balanced", seconds, {"random": [9, 3, 3], "balanced": [9, 2, 2]}, losses, slowest, [1, 30, 60]
    )
    assert (
        row["ratio"] == 2.0 and row["cpu_ratio"] == 1.5 and row["tokens_per_second"] == 30 and row["mean_tokens"] == 45
    )
    assert row["expected"] == 2.0 and row["loss_difference"] == 1e-3 and row["median_ms"] == 1500


@pytest.mark.slow
def test_quick_run_has_the_same_losses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("GRZOO_DATA", raising=False)
    balanced_training.main(["--quick"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["loss_difference"] < 1e-5 and figures["balanced_vs_random"] > 0
