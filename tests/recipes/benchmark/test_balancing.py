"""Laws: all contestants divide the same batch, each sample once; the figures are those of their definitions."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from grzoo.data.balancing import MicroBatchPlan
from grzoo.recipes.benchmark import balancing, balancing_cases
from grzoo.recipes.benchmark.balancing import Record, compare, headline
from grzoo.recipes.benchmark.balancing_cases import (
    COSTS,
    Case,
    plan_ours,
    plan_random,
    plan_tokens,
    plan_transformers,
    zipf_lengths,
)
from grzoo.recipes.benchmark.balancing_plot import plot


def zipf(users: int = 400) -> Case:
    return Case("zipf", zipf_lengths(users), 4096, headline=True)


PLANNERS = [plan_random, plan_tokens, plan_ours(COSTS["hstu"]), plan_transformers]


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (4, 1), (3, 4)])
def test_each_sample_has_one_place(planner, world_size: int, micro_batches: int) -> None:
    lengths = zipf().batch(32 * world_size, seed=0)
    plan = planner(lengths, world_size, micro_batches)
    assert plan.num_micro_batches == micro_batches
    members = [plan.members(k, r) for k in range(micro_batches) for r in range(world_size)]
    assert sorted(np.concatenate(members).tolist()) == list(range(len(lengths)))
    if planner is plan_random:
        assert {len(x) for x in members} <= {32 // micro_batches}


def test_transformers_plan_is_what_its_iterator_yields() -> None:
    world_size, micro_batches = 4, 2
    lengths = zipf().batch(32 * world_size, seed=1)
    plan = plan_transformers(lengths, world_size, micro_batches)
    for rank in range(world_size):
        yielded = list(balancing_cases.rebalance_sampler(lengths, world_size, micro_batches, rank))
        assert len(yielded) == micro_batches
        for number, rows in enumerate(yielded):
            assert sorted(rows) == plan.members(number, rank).tolist()


def test_figures_of_a_step_by_hand() -> None:
    # Micro-batch 0: ranks hold 3 + 1 and 2; micro-batch 1: nothing and 5.
    lengths = np.array([3, 1, 2, 5])
    plan = MicroBatchPlan(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), 2)
    record = Record()
    record.add(lambda tokens: np.asarray(tokens, dtype=np.float64) ** 2, lengths, plan, 2)
    assert record.slowest == [9 + 1 + 25]
    assert record.padded_slowest == [2 * 9 + 25]
    assert (record.tokens, record.padded_tokens) == ([11], [6 + 2 + 5])
    assert np.allclose(record.rank_costs[0], np.array([10, 29]) * 2 / 39)


def test_bound_holds_and_is_met_by_one_giant() -> None:
    giant = Case("giant", np.array([4000, *[1] * 63]), 4000, headline=True)
    for comparison in compare(giant, 2, 1, steps=2, sampler_steps=0):
        assert comparison.least() == pytest.approx(comparison.imbalance("ours"))
        assert comparison.least() > 1.9
    for comparison in compare(zipf(), 8, 2, steps=3, sampler_steps=0):
        assert 1 <= comparison.least() <= comparison.imbalance("ours") + 1e-12
        assert comparison.imbalance("ours") < comparison.imbalance("tokens") < comparison.imbalance("random")


def test_a_short_run_is_compared_with_the_same_steps_of_random_batches() -> None:
    comparison = compare(zipf(), 4, 1, steps=3, sampler_steps=1)[0]
    rows = {row["contestant"]: row for row in comparison.rows()}
    random, sampler = comparison.records["random"], comparison.records["transformers"]
    assert (rows["ours"]["steps"], rows["transformers"]["steps"]) == (3, 1)
    assert rows["transformers"]["speedup"] == pytest.approx(random.slowest[0] / sampler.slowest[0], abs=1e-4)
    assert headline([comparison, *compare(zipf(), 4, 1, 3, 1)[1:]])["ranks"] == 4


def test_formula_of_mtgr_gives_the_published_flops() -> None:
    assert COSTS["mtgr"](np.array([500]))[0] == pytest.approx(5.468e9, rel=1e-3)


def test_batches_repeat_users_only_when_there_are_too_few() -> None:
    case = Case("x", np.arange(1, 65), 64, headline=True)
    assert len(set(case.batch(64, seed=0).tolist())) == 64
    assert len(case.batch(256, seed=0)) == 256
    assert np.array_equal(case.batch(32, seed=3), case.batch(32, seed=3))
    assert not np.array_equal(case.batch(32, seed=3), case.batch(32, seed=4))


def test_command_ends_with_the_headline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("GRZOO_DATA", raising=False)
    monkeypatch.setattr(balancing, "WORLDS", (2, 4))
    monkeypatch.setattr(balancing_cases, "ZIPF_USERS", 1000)
    balancing.main(["--quick", "--csv", str(tmp_path / "rows.csv"), "--plot", str(tmp_path / "ranks.png")])
    captured = capsys.readouterr()
    figures = json.loads(captured.out.splitlines()[-1])
    assert 1 <= figures["bound"] <= figures["imbalance"] < figures["imbalance_random"]
    assert figures["data"] == ["zipf <= 4096"] and "ml-1m is left out" in captured.err
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + 2 * 3 * 2 * 4
    assert (tmp_path / "ranks.png").stat().st_size > 1000


def test_no_matplotlib_no_plot_but_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot({"x": [np.ones((2, 3))]}, ("ours",), "step", tmp_path / "x.png")
    assert "matplotlib is not installed" in capsys.readouterr().err and not (tmp_path / "x.png").exists()
