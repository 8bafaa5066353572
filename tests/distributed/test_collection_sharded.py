"""Law 1 and S3, S7, S10, S20-S22, S24, S26 on real gloo ranks: sharded tables equal those of one process."""

from pathlib import Path
from typing import Any

import embedding_jobs as jobs
import pytest
import torch
from grzoo.embeddings.hashing import owner
from spawn import RankFailed, spawn

WORLDS = (2, 3)
SHARD_BYTES = 30_000  # several shards, whose edges are inside ranks' ranges


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables saved by one process, in `one`; each world size saves beside it."""
    path = tmp_path_factory.mktemp("saved")
    jobs.save(0, 1, str(path / "one"), SHARD_BYTES)
    jobs.save(0, 1, str(path / "cut"), SHARD_BYTES)
    jobs.export(str(path / "export"), SHARD_BYTES)
    return path


_cache: dict[int, list[dict[str, Any]]] = {}


@pytest.fixture(params=WORLDS)
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    """Results of all jobs by rank; one set of processes per world size."""
    world = request.param
    todo: list[tuple[str, list[Any]]] = [("train", [name]) for name in jobs.OPTIMIZERS]
    todo += [("train", ["adamw"]), ("train", ["sgd", 1]), ("train", ["rowwise_adagrad", 3, 4, False])]
    todo += [("save", [str(folder / str(world)), SHARD_BYTES]), ("load", [str(folder / "one")])]
    todo += [(name, []) for name in ("bad_input", "failing_owner", "other_config", "not_finite", "one_silent_rank")]
    todo += [(name, []) for name in ("lost_step", "statistics", "reshard")]
    todo += [("damaged_shard", [str(folder / "cut")]), ("flipped_export", [str(folder / "export")])]
    if world == 3:
        todo += [("sub_group", [])]
    if world not in _cache:
        _cache[world] = spawn(world, jobs.run_jobs, todo, timeout=240)
    return _cache[world]


def merged(parts: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """table -> id -> tensor name -> value, over all ranks; each id must be on the rank that owns it, once."""
    result: dict[str, dict[int, dict[str, Any]]] = {}
    for rank, part in enumerate(parts):
        for table, columns in part.items():
            into = result.setdefault(table, {})
            assert owner(torch.tensor(columns["ids"], dtype=torch.int64), len(parts)).tolist() == [rank] * len(
                columns["ids"]
            )
            for i, row in enumerate(columns["ids"]):
                assert row not in into
                into[row] = {name: values[i] for name, values in columns.items()}
    return result


def assert_same_rows(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    assert {t: set(rows) for t, rows in a.items()} == {t: set(rows) for t, rows in b.items()}
    for table, rows in a.items():
        for row, columns in rows.items():
            for name, value in columns.items():
                torch.testing.assert_close(
                    torch.tensor(value, dtype=torch.float64),
                    torch.tensor(b[table][row][name], dtype=torch.float64),
                    rtol=tolerance,
                    atol=tolerance,
                    msg=lambda m, where=(table, row, name): f"{where}: {m}",
                )


@pytest.mark.parametrize("optimizer", jobs.OPTIMIZERS)
def test_law1_s10_rows_after_training_do_not_depend_on_the_number_of_ranks(ranks: list[Any], optimizer: str) -> None:
    alone = jobs.train(0, 1, optimizer)
    together = [rank[f"train {[optimizer]}"] for rank in ranks]
    assert_same_rows(merged([alone["rows"]]), merged([r["rows"] for r in together]), 2e-6)
    for rank in together:
        assert rank["norms"] == together[0]["norms"]
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-6)


@pytest.mark.parametrize("args", [["sgd", 1], ["rowwise_adagrad", 3, 4, False]], ids=str)
def test_law1_nor_on_micro_batches_and_merging(ranks: list[Any], args: list[Any]) -> None:
    alone = jobs.train(0, 1, args[0])
    assert_same_rows(merged([alone["rows"]]), merged([rank[f"train {args}"]["rows"] for rank in ranks]), 2e-6)


def test_rows_after_training_are_not_the_initial_ones() -> None:
    """The comparisons above are of something."""
    trained = jobs.train(0, 1, "adamw")["rows"]["item"]
    fresh = jobs.build().eval()
    fresh.prepare([{"input_ids": torch.tensor(trained["ids"])}], insert=True)
    assert (torch.tensor(trained["rows"]) - fresh.export_rows("item")["rows"]).abs().min() > 1e-4


def test_s24_files_have_the_same_bytes_from_any_number_of_ranks(ranks: list[Any], folder: Path) -> None:
    ours, theirs = folder / "one", folder / str(len(ranks))
    names = sorted(p.name for p in ours.iterdir())
    assert len(names) > 4 and names == sorted(p.name for p in theirs.iterdir())
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_s21_saved_by_one_rank_loaded_by_others_bit_for_bit(ranks: list[Any], folder: Path) -> None:
    loaded = merged([rank[f"load {[str(folder / 'one')]}"] for rank in ranks])
    assert_same_rows(loaded, merged([jobs.load(0, 1, str(folder / "one"))]), 0.0)
    assert len(loaded["item"]) == 505


def test_s21_saved_by_several_ranks_loaded_by_one(ranks: list[Any], folder: Path) -> None:
    expected = merged([jobs.load(0, 1, str(folder / "one"))])
    assert_same_rows(merged([jobs.load(0, 1, str(folder / str(len(ranks))))]), expected, 0.0)


def test_bad_input_of_one_rank_is_told_to_all_and_tables_still_work(ranks: list[Any]) -> None:
    messages = ("must be int64", "unknown feature 'nope'", "int64 tensor, got list", "must be a mapping", "")
    for rank, result in enumerate(ranks):
        outcomes, shape = result["bad_input []"]
        assert shape == [2, 6]
        for (kind, text), message in zip(outcomes, messages, strict=True):
            assert kind == ("ValueError" if message else "") and message in text
            if message and rank < len(ranks) - 1:
                assert text.startswith(f"rank {len(ranks) - 1} failed: ")


def test_s19_an_owner_that_cannot_insert_stops_all(ranks: list[Any]) -> None:
    kinds = [result["failing_owner []"][0] for result in ranks]
    assert kinds == ["MemoryError"] + ["RuntimeError"] * (len(ranks) - 1)
    assert all("no memory for rows" in result["failing_owner []"][1] for result in ranks)


def test_ranks_with_different_configs_are_refused(ranks: list[Any]) -> None:
    for result in ranks:
        kind, text = result["other_config []"]
        assert kind == "ValueError" and "different tables or seeds" in text


def test_s11_a_gradient_that_is_not_finite_on_one_rank_stops_all(ranks: list[Any]) -> None:
    assert [result["not_finite []"] for result in ranks] == [["FloatingPointError", False, True]] * len(ranks)


def test_s7_a_rank_without_gradients_joins_and_s12_no_gradients_is_a_no_op(ranks: list[Any]) -> None:
    results = [result["one_silent_rank []"] for result in ranks]
    assert sorted(step for steps, _, _ in results for step in steps) == [1, 1]
    assert all(rest == [True, 0.0] for _, *rest in results)


def test_ranks_that_disagree_on_pending_steps_are_told(ranks: list[Any]) -> None:
    for result in ranks:
        kind, text = result["lost_step []"]
        assert kind == "RuntimeError" and "disagree" in text


def test_both_dedups_save_what_they_should(ranks: list[Any]) -> None:
    statistics = [result["statistics []"] for result in ranks]
    asking = len(ranks) - 1
    assert [s["ids"] for s in statistics] == [60] * asking + [0]
    assert [s["unique_sent"] for s in statistics] == [10] * asking + [0]
    assert sum(s["received"] for s in statistics) == 10 * asking
    assert sum(s["unique_owned"] for s in statistics) == sum(s["inserted"] for s in statistics) == 10
    assert all(s["bytes_sent"] > 0 for s in statistics)


def test_rows_loaded_alike_are_dealt_out_and_others_refused(ranks: list[Any]) -> None:
    expected = jobs.build()
    optimizer = jobs.OPTIMIZERS["adamw"](expected)
    jobs.fill(expected)
    assert optimizer is expected.optimizer
    assert_same_rows(merged([result["reshard []"][0] for result in ranks]), merged([jobs.exported(expected)]), 0.0)
    for result in ranks:
        _, (refused, text), (moved, _) = result["reshard []"]
        assert (refused, moved) == ("ValueError", "ValueError") and "different rows" in text


def test_s22_a_damaged_shard_is_refused_by_all_and_nothing_is_lost(ranks: list[Any]) -> None:
    for result in ranks:
        (kind, text), rows = next(value for key, value in result.items() if key.startswith("damaged_shard"))
        assert kind == "ValueError" and "its header describes" in text and rows == 1


def test_s22_a_wrong_bit_in_any_shard_of_an_export_is_found_on_any_number_of_ranks(ranks: list[Any]) -> None:
    for result in ranks:
        outcomes, unharmed = next(value for key, value in result.items() if key.startswith("flipped_export"))
        assert len(outcomes) > 1 and unharmed == ["", ""]
        assert all("the checksum of embeddings-" in text for _, text in outcomes)


def test_s26_the_process_group_is_injectable(folder: Path, request: pytest.FixtureRequest) -> None:
    if 3 not in _cache:
        pytest.skip("runs with the jobs of three ranks")
    counts = [result["sub_group []"] for result in _cache[3]]
    assert counts[0][0] + counts[1][0] == 50 and counts[0][1] == counts[1][1] == 50
    assert 0 < counts[0][0] < 50 and counts[2] == [50, 50]


def test_the_helper_surfaces_exceptions_and_does_not_hang() -> None:
    with pytest.raises(RankFailed, match="nobody home"):
        spawn(2, jobs.raise_on_one_rank, timeout=30)
