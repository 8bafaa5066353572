"""An export without rows that were met too seldom, or not for too long: which go, and what is said."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseAdam, TableConfig
from grzoo.embeddings.io import load_tables, save_tables
from grzoo.recipes.pruning import prune
from grzoo.recipes.runtime import UserError


def build(track_use: bool) -> DynamicEmbeddingCollection:
    table = TableConfig(name="item", embedding_dim=3, track_use=track_use)
    return DynamicEmbeddingCollection([table], [FeatureConfig(name="item", table="item")])


def saved_model(folder: Path, *, track_use: bool = True) -> Any:
    """Ids 0 .. 99 of which step k met those from 10 * k on, once each; rows only, as recipes load a checkpoint."""
    tables = build(track_use)
    optimizer = SparseAdam(tables, lr=0.1)
    for step in range(4):
        tables({"item": torch.arange(10 * step, 100)})["item"].sum().backward()
        optimizer.step()
    save_tables(tables, folder, state=True, max_shard_bytes=1000)
    model = SimpleNamespace(embeddings=build(track_use))
    load_tables(model.embeddings, folder, state=False)
    return model


@pytest.mark.parametrize(
    ("limits", "first"),
    [
        ({"min_count": 3, "used_since": None}, 20),
        ({"min_count": None, "used_since": 2}, 10),
        ({"min_count": 2, "used_since": 4}, 30),
        ({"min_count": 1, "used_since": 1}, 0),
    ],
)
def test_rows_below_a_limit_go(tmp_path: Path, limits: dict[str, Any], first: int) -> None:
    model = saved_model(tmp_path)
    assert prune(model, tmp_path, **limits) == {"item": f"{100 - first} of 100 rows"}
    assert sorted(model.embeddings.ids("item").tolist()) == list(range(first, 100))


def test_a_checkpoint_without_use_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = saved_model(tmp_path, track_use=False)
    with pytest.raises(UserError, match="table 'item' of .* does not keep the last use.*track_use"):
        prune(model, tmp_path, min_count=2, used_since=None)
    assert model.embeddings.num_rows() == 100


@pytest.mark.parametrize("limits", [{"min_count": 0, "used_since": None}, {"min_count": None, "used_since": -3}])
def test_limits_below_one_are_refused(tmp_path: Path, limits: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="takes a number from 1"):
        prune(saved_model(tmp_path), tmp_path, **limits)
