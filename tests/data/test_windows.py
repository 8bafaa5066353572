"""Which events become inputs and targets: recent first in training, every target exactly once in evaluation."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from grzoo.data import EventDataset, EveryTarget, RecentFirst, SlidingWindows, StochasticLength
from grzoo.data.windows import trained_positions
from hypothesis import given
from hypothesis import strategies as st

ROWS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=12)


def dataset_of(rows: list[tuple[int, int]]) -> EventDataset:
    lengths = [length for length, _ in rows]
    return EventDataset.from_arrays({"item_id": np.zeros(sum(lengths), int)}, lengths, [first for _, first in rows])


@given(ROWS, st.integers(1, 20))
def test_recent_first_trains_the_targets_in_the_last_window(rows: list[tuple[int, int]], max_length: int) -> None:
    windows = RecentFirst(dataset_of(rows), max_length)
    samples = windows.select(np.arange(len(windows)))
    owner, event = trained_positions(samples)
    for row, (length, first) in enumerate(rows):
        expected = [e for e in range(1, length) if e >= first and e >= length - max_length]
        assert event[owner == row].tolist() == expected
        assert samples.num_inputs[row] == min(max(length - 1, 0), max_length)


@given(ROWS, st.integers(1, 20))
def test_every_target_is_evaluated_once_with_context(rows: list[tuple[int, int]], max_length: int) -> None:
    windows = EveryTarget(dataset_of(rows), max_length)
    samples = windows.select(np.arange(len(windows)))
    owner, event = trained_positions(samples)
    found = Counter(zip(samples.rows[owner].tolist(), event.tolist(), strict=True))
    assert found == Counter((row, e) for row, (n, first) in enumerate(rows) for e in range(max(first, 1), n))
    assert (samples.num_labels > 0).all() and (samples.num_inputs <= max_length).all()
    context = event - samples.begin[owner]
    assert (context >= np.minimum(event, max_length - max(1, max_length // 2) + 1)).all()


def test_a_leave_one_out_row_is_one_sample(split: Callable[..., EventDataset]) -> None:
    samples = EveryTarget(split([30, 3], [29, 2]), 10).select([0, 1])
    assert (samples.begin.tolist(), samples.end.tolist(), samples.target_from.tolist()) == ([19, 0], [30, 3], [29, 2])


def test_max_length_is_checked(split: Callable[..., EventDataset]) -> None:
    with pytest.raises(ValueError, match="at least 1 event, got 0"):
        RecentFirst(split([3]), 0)


def trained(windows, epoch: int = 0) -> list[tuple[int, int]]:
    """(row, event) of everything that an epoch trains."""
    samples = windows.select(np.arange(len(windows)), epoch)
    sample, event = trained_positions(samples)
    return list(zip(samples.rows[sample].tolist(), event.tolist(), strict=True))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(1, 20), st.floats(0, 0.95))
def test_sliding_windows_train_every_target_once(lengths: list[int], max_length: int, overlap: float) -> None:
    target_from = [n // 3 for n in lengths]
    dataset = EventDataset.from_arrays({"item_id": np.arange(sum(lengths))}, lengths, target_from)
    windows = SlidingWindows(dataset, max_length, overlap)
    expected = [(r, e) for r, n in enumerate(lengths) for e in range(max(1, target_from[r]), n)]
    assert sorted(trained(windows)) == expected
    samples = windows.select(np.arange(len(windows)))
    context = samples.first_label - samples.begin
    least = np.minimum(max_length - windows.stride + 1, samples.first_label)
    assert (samples.num_inputs <= max_length).all() and (context >= least).all()


def test_sliding_windows_overlap_as_told(split: Callable[..., EventDataset]) -> None:
    samples = SlidingWindows(split([21]), 8, 0.25).select(np.arange(4))
    assert (samples.end - samples.begin).tolist() == [3, 9, 9, 9] and samples.end.tolist() == [3, 9, 15, 21]


def test_stochastic_length_follows_its_law(split: Callable[..., EventDataset]) -> None:
    rows, length, alpha = 4000, 64, 1.5
    dataset = EventDataset.from_arrays({"item_id": np.zeros(rows * 50, int)}, [50] * rows)
    policy = StochasticLength(dataset, length, alpha, seed=3)
    inputs = policy.select(np.arange(rows)).num_inputs
    assert set(inputs.tolist()) == {policy.short, 49} and policy.short == round(length ** (alpha / 2))
    assert abs((inputs == 49).mean() - length**alpha / 49**2) < 0.03
    again = policy.select(np.arange(rows)[::-1])
    assert np.array_equal(again.num_inputs[::-1], inputs), "a row's draw depends on nothing but seed, epoch and row"
    assert not np.array_equal(policy.select(np.arange(rows), 1).num_inputs, inputs)
    everything = trained(policy)
    assert len(set(everything)) == len(everything)
    assert StochasticLength(split([9]), 8, 2.0).select([0]).num_inputs.tolist() == [8]


def test_bad_window_arguments(split: Callable[..., EventDataset]) -> None:
    with pytest.raises(ValueError, match="overlap.*got 1.0"):
        SlidingWindows(split([3]), 4, 1.0)
    with pytest.raises(ValueError, match="alpha.*got 1"):
        StochasticLength(split([3]), 4, 1)
