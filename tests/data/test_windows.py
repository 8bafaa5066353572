"""Which events become inputs and targets: recent first in training, every target exactly once in evaluation."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from grzoo.data import EventDataset, EveryTarget, RecentFirst
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
