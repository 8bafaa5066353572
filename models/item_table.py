"""The one table of a retrieval model, which inputs, labels, negatives and candidates share."""

from typing import Any

from grzoo.embeddings import FeatureConfig, TableConfig, policies_by_table

ITEM_TABLE = "items"


def item_tables(config: Any) -> list[TableConfig]:
    """The item table that a config of a retrieval model describes.

    Raises:
        ValueError: for an initializer or policies that no table can have.
    """
    table = TableConfig(
        name=ITEM_TABLE,
        embedding_dim=config.hidden_size,
        initializer=config.item_initializer,
        unknown=config.unknown_items,
        **policies_by_table(config.table_policies, [ITEM_TABLE])[ITEM_TABLE],
    )
    return [table]


def item_features() -> list[FeatureConfig]:
    """The fields of a micro-batch that look up the item table."""
    names = ("input_ids", "labels", "negative_ids", "candidate_ids")
    return [FeatureConfig(name=name, table=ITEM_TABLE) for name in names]
