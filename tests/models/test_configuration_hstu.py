"""The config says no early, and survives JSON."""

import pytest
from grzoo.models import HSTUConfig
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 0}, "hidden_size must be positive; got 0"),
        ({"num_negatives": -1}, "num_negatives must be positive; got -1"),
        ({"num_time_buckets": 161}, "num_time_buckets must be at most 160; got 161.*reach 146"),
        ({"temperature": 0}, "temperature must be positive; got 0"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout must lie in \[0, 1\); got 1.0"),
        (
            {"max_position_embeddings": 10},
            r"max_position_embeddings \(10\) is smaller than max_sequence_length \(200\)",
        ),
        ({"item_initializer": {"kind": "magic"}}, "magic"),
        ({"table_policies": {"users": {}}}, "users"),
        ({"table_policies": {"items": {"max_rows": 0}}}, "max_rows"),
    ],
)
def test_impossible_values(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        HSTUConfig(**fields)


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "50"}, {"use_time_bias": 3}, {"negative_sampling": "every"}, {"unknown_items": "one"}]
)
def test_wrong_types(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        HSTUConfig(**fields)


def test_names_of_the_paper():
    config = HSTUConfig(embedding_dim=64, num_blocks=4, num_heads=2, dqk=16, dv=8, dropout_rate=0.5)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 4, 2)
    assert (config.attention_head_dim, config.linear_head_dim, config.hidden_dropout) == (16, 8, 0.5)
    assert config.dqk == 16


def test_json_round_trip(tmp_path):
    config = HSTUConfig(
        hidden_size=8,
        item_initializer={"kind": "uniform", "scale": 0.5},
        negative_sampling="shared",
        table_policies={"items": {"max_rows": 100, "eviction": {"kind": "lru", "every": 5}, "placement": "device"}},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HSTUConfig and loaded.to_diff_dict() == config.to_diff_dict()
    (table,) = loaded.embedding_tables()
    assert table.max_rows == 100 and table.placement == "device"
    assert table.eviction is not None and table.eviction["every"] == 5
    assert (table.name, table.embedding_dim, table.initializer["scale"], table.unknown) == ("items", 8, 0.5, "zeros")
    assert {f.table for f in loaded.embedding_features()} == {"items"}
