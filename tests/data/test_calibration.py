"""Law: a measured cost decides where samples are computed, never what a step holds; the fit is the best allowed one."""

import numpy as np
import pytest
from grzoo.data import EventDataset, GenRecCollator, GlobalBatchSampler, StepLoader
from grzoo.data.calibration import TimeCost, calibrate, fit_cost
from hypothesis import given
from hypothesis import strategies as st

LENGTHS = np.array([16, 64, 128, 256])


@given(st.floats(1e-7, 1e-3), st.floats(1e-10, 1e-6))
def test_the_fit_finds_what_made_the_times(linear: float, quadratic: float) -> None:
    found = fit_cost(LENGTHS, TimeCost(linear, quadratic)(LENGTHS))
    assert found.linear == pytest.approx(linear, rel=1e-6, abs=1e-12)
    assert found.quadratic == pytest.approx(quadratic, rel=1e-6, abs=1e-15)


@given(st.lists(st.floats(1e-5, 10), min_size=4, max_size=4))
def test_no_allowed_cost_fits_better(seconds: list[float]) -> None:
    scipy = pytest.importorskip("scipy.optimize")
    terms = np.stack([LENGTHS / seconds, LENGTHS**2 / seconds], axis=1)
    best, _ = scipy.nnls(terms / terms.max(axis=0), np.ones(4))
    found = fit_cost(LENGTHS, seconds)
    assert found.linear >= 0 and found.quadratic >= 0
    error = np.linalg.norm(found(LENGTHS) / seconds - 1)
    assert error <= np.linalg.norm(terms / terms.max(axis=0) @ best - 1) + 1e-9


def test_times_are_those_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def run(length: int) -> int:
        clock[0] += 5 * (2e-3 * length + 1e-5 * length**2)
        return 5

    cost = calibrate(run, LENGTHS.tolist())
    assert (cost.linear, cost.quadratic) == (pytest.approx(2e-3), pytest.approx(1e-5))


def test_bad_measurements() -> None:
    with pytest.raises(ValueError, match="at least two lengths"):
        fit_cost([4, 4], [1.0, 2.0])
    with pytest.raises(ValueError, match="positive times"):
        fit_cost([4, 8], [1.0, 0.0])


def test_the_cost_moves_samples_and_changes_no_step() -> None:
    lengths = np.random.default_rng(0).integers(2, 60, 40)
    dataset = EventDataset.from_arrays({"item_id": np.arange(lengths.sum())}, lengths)

    def users(cost: TimeCost | None) -> list[list[list[int]]]:
        steps = []
        for rank in range(2):
            loader = StepLoader(
                dataset,
                GlobalBatchSampler(40, 10, seed=1),
                GenRecCollator(dataset, max_length=60),
                world_size=2,
                rank=rank,
            )
            if cost is not None:
                loader.balance_by(cost)
            steps.append([step.micro_batches[0]["user_ids"].tolist() for step in loader])
        return list(map(list, zip(*steps, strict=True)))

    linear, quadratic = users(None), users(TimeCost(0.0, 1.0))
    assert linear != quadratic
    assert [sorted(a + b) for a, b in linear] == [sorted(a + b) for a, b in quadratic]
