"""Tables and features from a schema as data/ writes it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from grzoo.data import DatasetSchema, FeatureSpec
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, TableConfig, features_from_schema

COLUMNS: dict[str, dict[str, Any]] = {
    "item_id": {"embedding_dim": 8, "features": ["input_ids", "labels"]},
    "last_item_id": {"table": "item_id"},
    "category": {"embedding_dim": 4, "unknown": "initial", "pooling": "mean"},
}


def schema() -> DatasetSchema:
    dtypes = {
        "item_id": "int64",
        "timestamp": "int64",
        "last_item_id": "int64",
        "category": "int32",
        "rating": "float32",
    }
    features = tuple(FeatureSpec(name=name, dtype=dtype) for name, dtype in dtypes.items())
    return DatasetSchema(name="x", features=features, id_mapping="hash")


def test_columns_of_a_schema_become_tables_and_features(tmp_path: Path) -> None:
    schema().save(tmp_path)
    expected = (
        [
            TableConfig(name="item_id", embedding_dim=8),
            TableConfig(name="category", embedding_dim=4, unknown="initial"),
        ],
        [
            FeatureConfig(name="input_ids", table="item_id"),
            FeatureConfig(name="labels", table="item_id"),
            FeatureConfig(name="last_item_id", table="item_id"),
            FeatureConfig(name="category", table="category", pooling="mean"),
        ],
    )
    for source in (tmp_path, tmp_path / "schema.json", str(tmp_path), schema().to_dict()):
        assert features_from_schema(source, COLUMNS) == expected


def test_s27_columns_that_share_a_table_share_its_rows() -> None:
    tables = DynamicEmbeddingCollection(*features_from_schema(schema().to_dict(), COLUMNS), backend="naive").eval()
    ids = torch.tensor([4, -2])
    rows = tables({"input_ids": ids, "last_item_id": ids}, insert=True)
    assert torch.equal(rows["input_ids"], rows["last_item_id"]) and tables.num_rows() == 2


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"colour": {"embedding_dim": 4}}, "no column 'colour': it has"),
        ({"rating": {"embedding_dim": 4}}, "'rating' has dtype 'float32', ids are one of"),
        ({"item_id": {"embedding_dim": 4, "width": 4}}, r"'item_id' has no setting \['width'\]"),
        ({"item_id": {"table": "item"}}, "embedding_dim"),
        ({"item_id": {"embedding_dim": 4, "features": "input_ids"}}, "must be a list of names, got 'input_ids'"),
        ({"item_id": {"embedding_dim": 0}}, "embedding_dim of table 'item_id' must be a positive integer"),
        ({"item_id": {"embedding_dim": 4, "pooling": "max"}}, "pooling of feature 'item_id'"),
        (
            {"item_id": {"embedding_dim": 4}, "category": {"embedding_dim": 8, "table": "item_id"}},
            "embedding_dim of table 'item_id' is 4, column 'category' has 8",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(columns: dict[str, dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        features_from_schema(schema().to_dict(), columns)


def test_what_is_no_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{")
    for source in (tmp_path, tmp_path / "other.json", {"columns": []}, {"features": [{"name": "x"}]}):
        with pytest.raises(ValueError, match="not the schema of a dataset folder"):
            features_from_schema(source, COLUMNS)
