"""Bad input of features: one clear ValueError each, before anything is looked up."""

import pytest
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, Jagged, TableConfig

IDS = torch.tensor([1, 2, 3])
BAGS = torch.tensor([0, 2, 3])
TABLES = [TableConfig(name="item", embedding_dim=4)]
FEATURES = [
    FeatureConfig(name="item", table="item"),
    FeatureConfig(name="sum", table="item", pooling="sum"),
    FeatureConfig(name="mean", table="item", pooling="mean"),
]


@pytest.mark.parametrize(
    ("feature", "given", "words"),
    [
        ("sum", Jagged(IDS.float(), BAGS), "int64, got torch.float32: convert"),
        ("sum", Jagged(IDS.int(), BAGS), "int64, got torch.int32: convert"),
        ("sum", IDS.float(), "int64, got torch.float32"),
        ("sum", Jagged(IDS[None], BAGS), "values of feature 'sum' must be of one dimension"),
        ("sum", Jagged([1, 2, 3], BAGS), "values of feature 'sum' must be a tensor, got list"),
        ("sum", Jagged(IDS, None), "offsets of feature 'sum' must be a tensor"),
        ("sum", Jagged(IDS, BAGS.to("meta")), "on the device of the values"),
        ("sum", [1, 2], "Jagged or an int64 tensor, got list"),
        ("sum", torch.tensor(3), "pools over the last dimension"),
        ("item", Jagged(IDS, BAGS.float()), "offsets of feature 'item' must be int64"),
        ("sum", Jagged(IDS, BAGS[:0]), "at least one number"),
        ("sum", Jagged(IDS, torch.tensor([0, 2])), "from 0 to its 3 values, they go from 0 to 2"),
        ("sum", Jagged(IDS, torch.tensor([0, 4])), "they go from 0 to 4"),
        ("sum", Jagged(IDS, torch.tensor([1, 3])), "they go from 1 to 3"),
        ("sum", Jagged(IDS, torch.tensor([0, 3, 1, 3])), "decrease from 3 to 1 at bag 1"),
        ("sum", Jagged.from_lengths(IDS, torch.tensor([4, -1])), "decrease from 4 to 3 at bag 1:"),
        ("sum", Jagged(IDS, BAGS, torch.ones(2)), r"float32 \[3\], one per value, got torch.float32 \[2\]"),
        ("sum", Jagged(IDS, BAGS, torch.ones(3).double()), "got torch.float64"),
        ("sum", Jagged(IDS, BAGS, torch.tensor([1, torch.nan, 1])), "not all finite"),
        ("mean", Jagged(IDS, BAGS, torch.ones(3)), "need pooling='sum', its pooling is 'mean'"),
        ("item", Jagged(IDS, BAGS, torch.ones(3)), "need pooling='sum', its pooling is 'none'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(feature: str, given: object, words: str) -> None:
    tables = DynamicEmbeddingCollection(TABLES, FEATURES, backend="naive")
    with pytest.raises(ValueError, match=words):
        tables.prepare([{feature: given}])  # type: ignore[dict-item]
    assert tables.num_rows() == 0


def test_two_tables_of_one_name_and_a_feature_without_a_table() -> None:
    twice = [*TABLES, TableConfig(name="item", embedding_dim=8)]
    with pytest.raises(ValueError, match="two tables are called 'item'"):
        DynamicEmbeddingCollection(twice, FEATURES)
    with pytest.raises(ValueError, match=r"feature 'f' uses table 'nowhere', which is not one of \['item'\]"):
        DynamicEmbeddingCollection(TABLES, [FeatureConfig(name="f", table="nowhere")])
    with pytest.raises(ValueError, match="pooling of feature 'f' must be one of"):
        FeatureConfig(name="f", table="item", pooling="max")
