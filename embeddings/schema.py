"""From the `schema.json` of a dataset folder to the tables and features of a collection."""

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import FeatureConfig, TableConfig

SCHEMA_FILE = "schema.json"
ID_DTYPES = ("int8", "int16", "int32", "int64")

_TABLE_FIELDS = {field.name for field in fields(TableConfig)} - {"name"}
_COLUMN_FIELDS = _TABLE_FIELDS | {"table", "features", "pooling"}


def features_from_schema(
    schema: str | os.PathLike[str] | Mapping[str, Any], columns: Mapping[str, Mapping[str, Any]]
) -> tuple[list[TableConfig], list[FeatureConfig]]:
    """Return the tables and features that look up columns of a dataset.

    Args:
        schema: a dataset folder, its schema.json, or what that holds: {"features": [{"name": ..., "dtype": ...}, ...]}.
        columns: for each column of ids its JSON settings, all but the width optional: "embedding_dim" and the other
            fields of TableConfig; "table", its name (default: the column's), which columns may share: then one of them
            has the table's fields, or all have the same; "features", the names under which batches hold the column
            (default: its own name); "pooling" of these.

    Batches give ids as int64: of narrower columns by `.long()`.

    Raises:
        ValueError: no schema there; a column that it does not have or whose dtype holds no ids; settings that are
            unknown or contradict each other, or that TableConfig or FeatureConfig refuses.

    Example:
        columns = {
            "item_id": {"embedding_dim": 64, "features": ["input_ids", "labels", "negative_ids"]},
            "last_item_id": {"table": "item_id"},
            "category": {"embedding_dim": 16, "unknown": "initial"},
        }
        tables = DynamicEmbeddingCollection(*features_from_schema("datasets/ml1m", columns))
    """
    dtypes = _dtypes(schema)
    table_fields: dict[str, dict[str, Any]] = {}
    features: list[FeatureConfig] = []
    for column, settings in columns.items():
        _check_column(column, settings, dtypes)
        table = settings.get("table", column)
        known = table_fields.setdefault(table, {})
        for name in sorted(_TABLE_FIELDS & set(settings)):
            if known.setdefault(name, settings[name]) != settings[name]:
                raise ValueError(
                    f"{name} of table {table!r} is {known[name]!r}, column {column!r} has {settings[name]!r}: columns"
                    " that share a table agree on it"
                )
        for name in settings.get("features", [column]):
            features.append(FeatureConfig(name=name, table=table, pooling=settings.get("pooling", "none")))
    return [TableConfig.from_dict({"name": name, **given}) for name, given in table_fields.items()], features


def _check_column(column: str, settings: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
    if column not in dtypes:
        raise ValueError(f"the schema has no column {column!r}: it has {sorted(dtypes)}")
    if dtypes[column] not in ID_DTYPES:
        raise ValueError(f"column {column!r} has dtype {dtypes[column]!r}, ids are one of {ID_DTYPES}")
    if unknown := sorted(set(settings) - _COLUMN_FIELDS):
        raise ValueError(f"column {column!r} has no setting {unknown}: the settings are {sorted(_COLUMN_FIELDS)}")
    names = settings.get("features", [column])
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"features of column {column!r} must be a list of names, got {names!r}")


def _dtypes(schema: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, str]:
    """Column -> dtype."""
    where = "the schema"
    try:
        if not isinstance(schema, Mapping):
            path = Path(schema)
            where = str(path / SCHEMA_FILE if path.is_dir() else path)
            schema = json.loads(Path(where).read_text(encoding="utf-8"))
        assert isinstance(schema, Mapping)
        return {feature["name"]: feature["dtype"] for feature in schema["features"]}
    except (OSError, ValueError, AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is not the schema of a dataset folder ({error!r})") from error
