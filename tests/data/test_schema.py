"""schema.json says what the folder holds, and a folder that does not fit is refused."""

import json
from pathlib import Path

import pytest
from grzoo.data import DatasetSchema, FeatureSpec

ITEM = FeatureSpec(name="item_id", dtype="int64")


def test_round_trip(tmp_path: Path) -> None:
    features = (ITEM, FeatureSpec(name="timestamp", dtype="int64"), FeatureSpec(name="rating", dtype="float32"))
    schema = DatasetSchema(
        name="x", features=features, id_mapping="hash", user_id_dtype="string", split={"kind": "temporal"}
    )
    schema.save(tmp_path)
    assert DatasetSchema.load(tmp_path) == schema
    assert schema.has_timestamps and schema.feature_names == ("item_id", "timestamp", "rating")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version 99"),
        ({"id_mapping": "random"}, "id_mapping is 'random'; it is one of identity, vocabulary, hash"),
        ({"user_id_dtype": "float"}, "user_id_dtype is 'float'"),
        ({"features": []}, "first feature"),
        ({"features": [{"name": "item_id", "dtype": "int32"}]}, "first feature"),
        ({"features": [{"name": "item_id", "dtype": "int64"}, {"name": "a", "dtype": "text"}]}, "dtype 'text'"),
        ({"features": [{"name": "item_id", "dtype": "int64"}] * 2}, "repeat"),
        ({"colour": 1}, r"unknown fields \['colour'\]"),
    ],
)
def test_a_schema_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    values = DatasetSchema(name="x", features=(ITEM,), id_mapping="identity").to_dict()
    (tmp_path / "schema.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(ValueError, match=message):
        DatasetSchema.load(tmp_path)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a dataset folder"):
        DatasetSchema.load(tmp_path)
    (tmp_path / "schema.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        DatasetSchema.load(tmp_path)
