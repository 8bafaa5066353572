"""What the exchange sends is counted as it is: by hand on a small step, and by the tables themselves."""

from pathlib import Path

import pytest
import torch
from grzoo.embeddings.hashing import owner
from grzoo.recipes.benchmark.exchange import (
    EXCHANGES,
    Criteo,
    MovieLens,
    Settings,
    Zipf,
    check,
    global_steps,
    headline,
    measure,
    traffic,
)

SETTINGS = Settings(samples=12, micro_batches=2, steps=2, dim=4)


def test_law1_the_ids_of_a_step_do_not_depend_on_ranks() -> None:
    log = Zipf(1.2)
    steps = [global_steps(log, SETTINGS, world) for world in (1, 3)]
    for alone, dealt in zip(*steps, strict=True):
        whole, parts = (torch.cat([micro["item"] for rank in step for micro in rank]) for step in (alone, dealt))
        assert torch.equal(whole.sort().values, parts.sort().values) and len(whole) == 12 * log.length


def test_dedup_is_counted_as_it_is_by_hand() -> None:
    ids = torch.arange(100)
    mine, theirs = ids[owner(ids, 2) == 0][:2], ids[owner(ids, 2) == 1][:2]
    a, b, (x, y) = mine[0], mine[1], theirs
    step = [  # rank 0: [a a x], [x b]; rank 1: [a x], [a]
        [{"t": torch.stack([a, a, x])}, {"t": torch.stack([x, b])}],
        [{"t": torch.stack([a, x])}, {"t": torch.stack([a])}],
    ]
    found = {
        (dedup, exchange): [
            traffic(step, ["t"], 4, dedup, exchange)[key] for key in ("ids", "ids_sent", "rows_looked_up")
        ]
        for dedup in ("none", "one", "two")
        for exchange in EXCHANGES
    }
    assert found["none", "step"] == found["none", "micro-batch"] == [8, 4, 8]  # x x from 0, a a from 1
    assert found["one", "step"] == [8, 2, 5] and found["two", "step"] == [8, 2, 3]  # a b x
    assert found["one", "micro-batch"] == [8, 4, 7] and found["two", "micro-batch"] == [8, 4, 5]
    assert traffic(step, ["t"], 4, "two", "step")["row_bytes"] == 2 * 4 * 4 and y not in torch.stack([a, b, x])


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_count_what_was_computed(ranks: int) -> None:
    rows = measure({"zipf": Zipf(1.2)}, ranks, SETTINGS, with_ranks=True)
    assert sum(row["ranks_ran"] for row in rows) == 2
    assert headline(rows)["zipf_rows_saved_by_dedup"] > 1


def test_a_count_that_differs_fails_the_run() -> None:
    computed = {"id_bytes": 8, "row_bytes": 16, "gradient_bytes": 16, "rows_looked_up": 3}
    check(computed, {"bytes_sent": 72, "unique_owned": 3}, 32)
    for counted in ({"bytes_sent": 71, "unique_owned": 3}, {"bytes_sent": 72, "unique_owned": 4}):
        with pytest.raises(RuntimeError, match="computed were 72 bytes, 3 rows"):
            check(computed, counted, 32)


def test_real_ids_are_read(real_data: Path) -> None:
    films, clicks = MovieLens(real_data / "ml-1m"), Criteo(real_data / "criteo-80k")
    (films_step,), (clicks_step,) = (global_steps(log, Settings(8, 1, 1, 4), 1) for log in (films, clicks))
    assert 8 <= len(films_step[0][0]["item"]) <= 8 * 200
    assert set(clicks_step[0][0]) == {f"c{k}" for k in range(1, 27)}
    assert all(len(ids) <= 8 for ids in clicks_step[0][0].values())
