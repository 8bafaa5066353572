"""Law 1, S8, S16-S19, S27 of admission and eviction: the same rows are kept by 1, 2, 3 and 4 ranks."""

from pathlib import Path
from typing import Any

import policy_jobs as jobs
import pytest
from policy_reference import ReferenceTable, drifting_ids
from spawn import spawn

WORLDS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return spawn(max(WORLDS), jobs.all_worlds, str(folder), timeout=240)


@pytest.fixture(scope="module")
def expected() -> dict[str, ReferenceTable]:
    tables = {config.name: ReferenceTable(config) for config in jobs.policy_tables()}
    for number, ids in enumerate(drifting_ids(jobs.STEPS, jobs.PER_STEP)):
        for table in tables.values():
            table.step(ids.tolist())
        if number == 2:
            tables["lru"].pinned = set(range(-30, 0))
    return tables


def joined(ranks: list[dict[str, Any]], world: int, job: str) -> dict[str, dict[str, dict[int, Any]]]:
    """table -> column -> id -> value over all ranks."""
    result: dict[str, dict[str, dict[int, Any]]] = {}
    for rank in ranks[:world]:
        for table, columns in rank[str(world)][job].items():
            into = result.setdefault(table, {})
            for name, values in columns.items():
                ids = columns["ids"] if name not in ("candidates", "evicted") else values[0]
                entries = values if name not in ("candidates", "evicted") else values[1]
                into.setdefault(name, {}).update(zip(ids, entries, strict=True))
    return result


@pytest.mark.parametrize("job", ["merged", "apart", "resumed"])
@pytest.mark.parametrize("world", WORLDS)
def test_law1_s8_s16_s17_s27_the_same_rows_are_kept(
    ranks: list[Any], expected: dict[str, ReferenceTable], world: int, job: str
) -> None:
    if ranks[0][str(world)][job] is None:
        pytest.skip("apart is run on one and three ranks")
    found = joined(ranks, world, job)
    for name, table in expected.items():
        assert sorted(found[name]["ids"]) == sorted(table.rows), name
        assert found[name]["evicted"] == table.evicted, name
        assert found[name].get("candidates", {}) == {i: u.count for i, u in table.candidates.items()}, name
        if name != "plain":
            assert found[name]["last_use"] == {i: u.last_use for i, u in table.rows.items()}, name
        if name not in ("plain", "lfu"):
            assert found[name]["count"] == {i: u.count for i, u in table.rows.items()}, name
    lfu = expected["lfu"]
    half_lives = {i: lfu.clock // 6 - u.last_use // 6 for i, u in lfu.rows.items()}  # passed since the count was noted
    assert {i: n >> half_lives[i] for i, n in found["lfu"]["count"].items()} == {
        i: u.count for i, u in lfu.rows.items()
    }


@pytest.mark.parametrize("world", WORLDS)
def test_s21_policies_are_saved_as_the_same_bytes_by_any_number_of_ranks(
    ranks: list[Any], folder: Path, world: int
) -> None:
    files = sorted(path.name for path in (folder / "1").iterdir())
    assert files == sorted(path.name for path in (folder / f"again-{world}").iterdir())
    for name in files:
        assert (folder / "1" / name).read_bytes() == (folder / f"again-{world}" / name).read_bytes(), name


def test_the_stream_makes_every_policy_evict(expected: dict[str, ReferenceTable]) -> None:
    for name, table in expected.items():
        assert (len(table.evicted) > 20) == (name != "plain"), name
    assert len(expected["lru"].rows) == 90 and len(expected["ttl"].rows) >= 60
    assert any(i in expected["lru"].rows for i in range(-30, 0)), "the pinned ids are the oldest"


@pytest.mark.parametrize("world", WORLDS)
def test_law1_rows_and_state_are_those_of_one_rank(ranks: list[Any], world: int) -> None:
    alone, together = joined(ranks, 1, "merged"), joined(ranks, world, "merged")
    for name, columns in alone.items():
        for column in ("rows", "sum"):
            assert together[name][column].keys() == columns[column].keys()
            for i, value in columns[column].items():
                assert together[name][column][i] == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_s19_a_full_table_raises_on_every_rank_and_names_the_remedy(ranks: list[Any], world: int) -> None:
    for rank in ranks[:world]:
        ceiling, eviction, ids, disagreement, *rows = rank[str(world)]["refuse"]
        assert "'a' has 0 rows and needs 6 more, max_rows is 5" in ceiling and "raise max_rows" in ceiling
        assert "'a' has 6 rows and max_rows is 5" in eviction and "Raise max_rows" in eviction
        assert "must be an int64 tensor" in ids
        assert ("disagree" in disagreement) == (world > 1)
        assert rows == ["0", "6"]


@pytest.mark.parametrize("world", WORLDS)
def test_erase_takes_the_ids_of_all_ranks_and_reports_unknown_ones(ranks: list[Any], world: int) -> None:
    for rank in ranks[:world]:
        assert rank[str(world)]["erase"] == [[1 + world, world], 19 - world, 1, 19 - world, 1 + world]


@pytest.mark.parametrize("world", WORLDS)
def test_s17_a_rank_without_memory_for_the_log_deletes_nothing_and_all_ranks_raise(
    ranks: list[Any], world: int
) -> None:
    for number, rank in enumerate(ranks[:world]):
        erased, erased_whole, left, evicted, evicted_whole, _ = rank[str(world)]["without_memory"]
        alone = "MemoryError: nothing left"
        told = alone if number == world - 1 else f"RuntimeError: rank {world - 1} failed: nothing left"
        assert (erased, evicted) == (told, told) and erased_whole and evicted_whole
        assert (left == 40) == (world == 1) and left >= 20
