"""A long run on a drifting stream: memory and lookup time stay, and hits are those of an LRU (S17, S19)."""

import pytest
from grzoo.recipes.benchmark.eviction import IdealLRU, drifting_ids, headline, soak


def test_the_ideal_lru_keeps_what_was_used_last() -> None:
    lru = IdealLRU(2)
    assert [lru.use([1, 2]), lru.use([1]), lru.use([3]), lru.use([1, 2]), lru.use([3])] == [0, 1, 0, 1, 0]


def test_the_stream_moves_on_and_is_a_function_of_the_step() -> None:
    first, later = (drifting_ids(step, count=500, drift=10, spread=100) for step in (0, 50))
    assert first.max() <= 0 and later.min() >= 400
    assert first.equal(drifting_ids(0, count=500, drift=10, spread=100))


@pytest.mark.parametrize("steps", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_is_constant_and_hits_are_those_of_an_lru(steps: int) -> None:
    rows = soak(steps, max_rows=1000, every=5, count=200, drift=10)
    found = headline(rows)
    assert found["table_bytes_growth"] == pytest.approx(1.0, abs=0.02 if steps > 1000 else 0.1)
    assert 0.99 <= found["hit_rate_vs_ideal_lru"] <= 1.1
    assert all(1000 <= row["rows"] <= 1000 + 5 * 200 for row in rows[2:])
    assert rows[-1]["evicted"] > 0 and rows[-1]["hit_rate"] < 0.99
