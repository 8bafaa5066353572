"""Laws: every algorithm gives each sample a bin; Karmarkar-Karp is the published one; the figures are as defined."""

import numpy as np
import pytest
from grzoo.recipes.benchmark.balancing_algorithms import ALGORITHMS, compare, karmarkar_karp
from grzoo.recipes.benchmark.balancing_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", ALGORITHMS)
@settings(max_examples=30, deadline=None)
@given(cost=st.lists(st.floats(0.1, 100), min_size=1, max_size=40), bins=st.integers(1, 6))
def test_each_sample_has_a_bin(name: str, cost: list[float], bins: int) -> None:
    chosen = ALGORITHMS[name](np.array(cost), bins)
    assert chosen.shape == (len(cost),) and (chosen >= 0).all() and (chosen < bins).all()


def test_karmarkar_karp_by_hand() -> None:
    # 8 and 7 differ by 1, 6 and 5 by 1; then 4 - 1 - 1 = 2: sums 16 and 14, where longest first ends with 17 and 13.
    cost = np.array([8.0, 7, 6, 5, 4])
    assert sorted(np.bincount(karmarkar_karp(cost, 2), weights=cost)) == [14, 16]
    assert sorted(np.bincount(ALGORITHMS["longest first"](cost, 2), weights=cost)) == [13, 17]


def test_figures_are_over_the_bound() -> None:
    rows = compare(Case("x", np.array([4000, *[1] * 255]), 4000, headline=True), 8, 2)
    assert all(row["imbalance"] == pytest.approx(1, abs=1e-6) for row in rows) and len(rows) == 3
