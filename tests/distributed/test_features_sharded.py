"""Law 1 and S10, S21 for pooled features, shared rows, pretrained and bfloat16 rows on three gloo ranks."""

from pathlib import Path
from typing import Any

import feature_jobs as jobs
import pytest
import torch
from safetensors.torch import save_file
from spawn import spawn

WORLD = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features")
    save_file({"ids": torch.tensor([-9, 3, 8]), "rows": torch.rand(3, 4)}, path / "vectors.safetensors")
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    return jobs.train(0, 1, str(folder / "vectors.safetensors"), str(folder / "one"))


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Any]:
    return spawn(WORLD, jobs.run, str(folder / "vectors.safetensors"), str(folder / "three"), timeout=120)


def by_id(parts: list[Any]) -> dict[tuple[str, int, str], Any]:
    return {
        (table, row, name): values[k]
        for part in parts
        for table, columns in part["rows"].items()
        for k, row in enumerate(columns["ids"])
        for name, values in columns.items()
    }


def assert_close(a: Any, b: Any, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=tolerance, atol=2e-6)


def test_law1_s10_rows_and_shared_rows_do_not_depend_on_the_number_of_ranks(alone: Any, ranks: list[Any]) -> None:
    expected, found = by_id([alone]), by_id([rank["train"] for rank in ranks])
    assert set(expected) == set(found) and len(expected) > 100
    for key, value in expected.items():
        tolerance = 2**-6 if key[::2] == ("word", "rows") else 2e-6  # bfloat16: sums may round to the other neighbour
        assert_close(found[key], value, tolerance)
    for rank in ranks:
        assert rank["train"]["shared"] == ranks[0]["train"]["shared"], "replicas are the same bits"
        assert rank["train"]["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        for name, value in alone["shared"].items():
            assert_close(rank["train"]["shared"][name], value)
    assert alone["shared"]["step"] == [jobs.STEPS]


def test_s21_files_have_the_same_names_for_any_number_of_ranks(alone: Any, ranks: list[Any], folder: Path) -> None:
    names = [sorted(file.name for file in (folder / world).iterdir()) for world in ("one", "three")]
    assert names[0] == names[1] and "embeddings-shared.safetensors" in names[0]


def test_bad_input_on_one_rank_stops_all_with_its_message(ranks: list[Any]) -> None:
    words = ("must be int64, got torch.float32", "from 0 to 1", "decrease from 3 to 2", "not all finite")
    for r, rank in enumerate(ranks):
        assert len(rank["bad_input"]) == len(words)
        for message, word in zip(rank["bad_input"], words, strict=True):
            assert word in message and (r == WORLD - 1 or message.startswith(f"rank {WORLD - 1} failed"))
        assert "No such file" in rank["missing_vectors"]
