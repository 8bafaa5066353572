"""Initial values from a file: S1, S4, S5, S13 on each backend of host memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseAdagrad, TableConfig
from grzoo.embeddings import pretrained as pretrained_module
from grzoo.embeddings.io import load_tables, save_tables
from safetensors.torch import load_file, save_file
from torch import Tensor

IDS = torch.tensor([5, -(2**63), 2**63 - 1, 0])
ROWS = torch.arange(12.0).view(4, 3)
OTHERWISE = {"kind": "normal", "std": 1.0}
ASKED = torch.tensor([0, 9, 5, -(2**63), 0])


def build(file: Path, *, backend: str = "naive", unknown: str = "zeros", dim: int = 3) -> DynamicEmbeddingCollection:
    spec = {"kind": "pretrained", "file": str(file), "otherwise": OTHERWISE}
    configs = [
        TableConfig(name="plain", embedding_dim=dim, initializer=OTHERWISE),
        TableConfig(name="item", embedding_dim=dim, initializer=spec, unknown=unknown),
    ]
    features = [FeatureConfig(name=config.name, table=config.name) for config in configs]
    return DynamicEmbeddingCollection(configs, features, backend=backend, seed=1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"ids": IDS, "rows": ROWS}, tmp_path / "vectors.safetensors")
    return tmp_path / "vectors.safetensors"


def look_up(tables: DynamicEmbeddingCollection, ids: Tensor, **options: bool) -> Tensor:
    with torch.no_grad():
        return tables({"item": ids, "plain": ids}, **options)["item"]


@pytest.mark.parametrize("backend", ["naive", "host"])
def test_s1_s5_rows_start_from_the_file_and_the_others_from_the_other_law(file: Path, backend: str) -> None:
    tables = build(file, backend=backend)
    rows = look_up(tables, ASKED)
    assert torch.equal(rows[[0, 2, 3, 4]], ROWS[[3, 0, 1, 3]])
    config = TableConfig(name="item", embedding_dim=3, initializer=OTHERWISE)
    other = DynamicEmbeddingCollection([config], [FeatureConfig(name="item", table="item")], seed=1).eval()
    assert torch.equal(rows[1:2], other({"item": ASKED[1:2]}, insert=True)["item"])
    stored = tables.export_rows("item")
    assert torch.equal(stored["rows"][stored["ids"] == 5], ROWS[:1])


def test_s4_unknown_initial_is_the_value_of_the_file(file: Path) -> None:
    tables = build(file, unknown="initial").eval()
    unknown = look_up(tables, ASKED)
    assert tables.num_rows() == 0 and torch.equal(unknown, look_up(tables, ASKED, insert=True))


def test_vectors_are_read_once_by_all_tables_of_a_file_and_not_for_ids_that_have_rows(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [file, *(tmp_path / f"{k}.safetensors" for k in range(11))]
    for other in files[1:]:
        other.write_bytes(file.read_bytes())
    read: list[str] = []
    monkeypatch.setattr(pretrained_module, "load_file", lambda path: read.append(path) or load_file(path))
    many = [build(path) for path in files] + [build(file)]
    for _ in range(3):
        for tables in many:
            look_up(tables, ASKED, insert=True)
    assert len(read) == len(files)
    copied = copy.deepcopy(many[0])
    look_up(copied, torch.tensor([77]), insert=True)
    assert len(read) == len(files)


def test_s13_training_goes_on_from_it_and_erased_rows_start_from_it_again(file: Path) -> None:
    tables = build(file, backend="host")
    optimizer = SparseAdagrad(tables, lr=0.5)
    tables({"item": ASKED})["item"].sum().backward()
    optimizer.step()
    torch.testing.assert_close(look_up(tables, IDS[:1]), ROWS[:1] - 0.5)
    tables.physical[0].storage.erase(torch.ones(1, dtype=torch.int32), IDS[:1])
    assert torch.equal(look_up(tables, IDS[:1]), ROWS[:1])


def test_a_saved_table_loads_without_the_file(file: Path, tmp_path: Path) -> None:
    tables = build(file)
    rows = look_up(tables, ASKED)
    save_tables(tables, tmp_path / "saved", state=False)
    file.unlink()
    again = build(file).eval()
    load_tables(again, tmp_path / "saved")
    assert torch.equal(look_up(again, ASKED), rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "No such file"),
        ({"rows": ROWS[:, :2].clone()}, "have width 2, embedding_dim is 3"),
        ({"rows": ROWS[:3].clone()}, r"rows must be float32 \[4, dim\]"),
        ({"rows": ROWS.double()}, "got torch.float64"),
        ({"rows": ROWS * torch.nan}, "not finite"),
        ({"ids": IDS.int()}, "ids must be int64"),
        ({"ids": torch.tensor([5, 6, 5, 7])}, "not distinct: 5 is there more than once"),
        ({"ids": None}, r"lacks \['ids'\]: it holds \['rows'\]"),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_nothing_is_inserted(file: Path, change: Any, words: str) -> None:
    if change is None:
        file.unlink()
    else:
        save_file({k: v for k, v in ({"ids": IDS, "rows": ROWS} | change).items() if v is not None}, file)
    tables = build(file)
    with pytest.raises(ValueError, match=f"pretrained rows of table 'item' in .*{words}"):
        look_up(tables, ASKED)
    assert tables.num_rows() == 0


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "pretrained", "file": "x"},
        {"kind": "pretrained", "file": 3, "otherwise": OTHERWISE},
        {"kind": "pretrained", "file": "x", "otherwise": {"kind": "pretrained"}},
        {"kind": "pretrained", "file": "x", "otherwise": {"kind": "normal"}},
    ],
)
def test_an_initializer_that_does_not_fit_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="initializer"):
        TableConfig(name="item", embedding_dim=3, initializer=spec)
