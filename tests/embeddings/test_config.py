"""Configs are JSON, strict, and say what to do."""

import json

import pytest
from grzoo.embeddings import FeatureConfig, TableConfig


def test_configs_survive_json() -> None:
    table = TableConfig(name="item", embedding_dim=8, initializer={"kind": "uniform", "scale": 0.1}, unknown="initial")
    assert TableConfig.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    feature = FeatureConfig(name="input_ids", table="item")
    assert FeatureConfig.from_dict(feature.to_dict()) == feature
    assert table.init_key == "item" and TableConfig(name="b", embedding_dim=1, init_key="a").init_key == "a"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "table name ''"),
        ({"name": "a b"}, "'a b'"),
        ({"name": 3}, "table name 3"),
        ({"embedding_dim": 0}, "positive integer, got 0"),
        ({"embedding_dim": 2.0}, "got 2.0"),
        ({"embedding_dim": True}, "got True"),
        ({"unknown": "raise"}, "got 'raise'"),
        ({"init_key": 3}, "init_key"),
        ({"dims": 3}, "no field \\['dims'\\]"),
        ({"initializer": {"kind": "xavier"}}, "xavier"),
        ({"initializer": {"kind": "normal"}}, "'std'"),
        ({"initializer": {"kind": "normal", "std": -1}}, "negative"),
        ({"initializer": {"kind": "normal", "std": float("inf")}}, "finite"),
        ({"initializer": {"kind": "constant", "value": 1, "std": 2}}, "exactly"),
        ({"initializer": "normal"}, "'normal'"),
    ],
)
def test_bad_table_configs_are_refused_with_the_value(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableConfig.from_dict({"name": "item", "embedding_dim": 8} | values)


def test_missing_fields_are_named() -> None:
    with pytest.raises(ValueError, match="table"):
        FeatureConfig.from_dict({"name": "a"})
    with pytest.raises(ValueError, match="table of feature 'a' ''"):
        FeatureConfig(name="a", table="")
