"""Configs are JSON, strict, and say what to do."""

import json

import pytest
from grzoo.embeddings import FeatureConfig, TableConfig, policies_by_table


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


def test_policies_survive_json_with_their_defaults_filled_in() -> None:
    table = TableConfig(
        name="a", embedding_dim=2, admission={"min_count": 2}, eviction={"kind": "lfu", "every": 7}, max_rows=5
    )
    assert table.admission == {"min_count": 2, "forget_after": 10_000}
    assert table.eviction == {"kind": "lfu", "every": 7, "max_evictions": None, "half_life": 10_000}
    assert TableConfig.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_rows": 0}, "max_rows of table 'item' must be a positive integer, got 0"),
        ({"max_rows": 1.5}, "got 1.5"),
        ({"track_use": 1}, "true or false, got 1"),
        ({"admission": 3}, "must be a mapping or None, got 3"),
        ({"admission": {}}, "needs \\['min_count'\\]"),
        ({"admission": {"min_count": 0}}, "'min_count'.*positive integer, got 0"),
        ({"admission": {"min_count": 2, "forget": 3}}, "no field \\['forget'\\]"),
        ({"eviction": {"kind": "fifo"}}, "one of \\['lfu', 'lru', 'ttl'\\].*'fifo'"),
        ({"eviction": "lru"}, "got 'lru'"),
        ({"eviction": {"kind": "ttl"}}, "needs \\['steps'\\]"),
        ({"eviction": {"kind": "ttl", "steps": 3, "every": 0}}, "'every'.*got 0"),
        ({"eviction": {"kind": "lru", "half_life": 3}, "max_rows": 3}, "no field \\['half_life'\\]"),
        ({"eviction": {"kind": "lru", "max_evictions": 0}, "max_rows": 3}, "'max_evictions'.*got 0"),
        ({"eviction": {"kind": "ttl", "steps": 3, "min_rows": 9}, "max_rows": 8}, "min_rows 9 is more than max_rows 8"),
        ({"eviction": {"kind": "ttl", "steps": 3, "min_rows": -1}}, "'min_rows'.*got -1"),
    ],
)
def test_bad_policies_are_refused_with_the_value(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableConfig.from_dict({"name": "item", "embedding_dim": 8} | values)


@pytest.mark.parametrize("kind", ["lru", "lfu"])
def test_eviction_without_effect_warns(kind: str) -> None:
    with pytest.warns(UserWarning, match="no effect without max_rows"):
        TableConfig(name="a", embedding_dim=2, eviction={"kind": kind})


def test_policies_of_a_model_go_to_the_tables_that_they_name() -> None:
    found = policies_by_table({"b": {"max_rows": 3}}, ["a", "b"])
    assert found == {"a": {}, "b": {"max_rows": 3}} and policies_by_table(None, ["a"]) == {"a": {}}
    for bad, message in (
        ({"c": {}}, "name \\['c'\\]: the tables are \\['a', 'b'\\]"),
        ({"a": {"seed": 3}}, "'a' have no field \\['seed'\\]"),
        ({"a": 3}, "must be {table"),
        ("lru", "got 'lru'"),
    ):
        with pytest.raises(ValueError, match=message):
            policies_by_table(bad, ["a", "b"])
