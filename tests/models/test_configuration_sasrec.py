"""The config says no early, and survives JSON."""

import pytest
from grzoo.models import SASRecConfig, SASRecForRetrieval
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 0}, "hidden_size must be positive; got 0"),
        ({"intermediate_size": -1}, "intermediate_size must be positive; got -1"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout must lie in \[0, 1\); got 1.0"),
        ({"hidden_size": 6, "num_attention_heads": 4}, r"hidden_size \(6\) must be a multiple.*\(4\)"),
        ({"negative_sampling": "all"}, "loss 'bce' takes negative_sampling 'uniform' alone; got 'all'"),
        ({"loss": "gbce"}, "needs num_items.*got None"),
        ({"loss": "gbce", "num_items": 3, "num_negatives": 3}, "needs num_items, more than num_negatives.*got 3"),
        ({"gbce_calibration": 2.0}, r"gbce_calibration must lie in \[0, 1\]; got 2.0"),
        ({"item_initializer": {"kind": "magic"}}, "magic"),
        ({"table_policies": {"users": {}}}, "users"),
        ({"table_policies": {"items": {"max_rows": 0}}}, "max_rows"),
    ],
)
def test_impossible_values(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        SASRecConfig(**fields)


def test_power_of_gbce_at_its_ends():
    """No calibration is BCE; full calibration weighs the positive by the rate of sampling."""
    fields = dict(loss="gbce", num_items=101, num_negatives=10)
    assert SASRecConfig(**fields, gbce_calibration=0).positive_power == pytest.approx(1.0)
    assert SASRecConfig(**fields, gbce_calibration=1).positive_power == pytest.approx(0.1)
    assert SASRecConfig().positive_power == 1.0


def test_json_round_trip(tmp_path):
    policies = {"items": {"max_rows": 100, "eviction": {"kind": "lru", "every": 5}, "track_use": True}}
    config = SASRecConfig(
        hidden_size=8, layer_norm="post", loss="softmax", negative_sampling="all", table_policies=policies
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SASRecConfig and loaded.to_diff_dict() == config.to_diff_dict()
    (table,) = SASRecForRetrieval(loaded, embedding_backend="naive").embeddings.tables.values()
    assert table.max_rows == 100 and table.track_use and table.eviction["every"] == 5
