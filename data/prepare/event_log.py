"""Any log of events in a CSV or Parquet file, by the names of its columns."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from .config import PrepareConfig
from .log import EventLog
from .readers import column, existing, numbers, read_table, seconds

OPTIONS = frozenset(
    {
        "source",
        "user_column",
        "item_column",
        "timestamp_column",
        "timestamp_unit",
        "feature_columns",
        "item_metadata",
        "item_metadata_id",
        "title_column",
        "max_memory_gb",
    }
)


RESERVED = frozenset({"user_id", "item_id", "timestamp", "target_from"})


def read(config: PrepareConfig) -> EventLog:
    """The log in the file (or folder of Parquet files) `source`."""
    if config.source is None:
        raise ValueError("event_log needs --source PATH, a CSV or Parquet file of events")
    path = existing(config.source)
    table = read_table(path, (config.user_column, config.item_column))
    if not len(table):
        raise ValueError(f"{path} is empty: it holds no events")
    check_features(config)
    times = None
    if config.timestamp_column:
        times = seconds(column(table, config.timestamp_column, path, "timestamp_column"), config.timestamp_unit, path)
    return EventLog(
        users=column(table, config.user_column, path, "user_column"),
        items=column(table, config.item_column, path, "item_column"),
        timestamps=times,
        features={
            name: numbers(column(table, name, path, "feature_columns"), name, path) for name in config.feature_columns
        },
        **about(config),
    )


def check_features(config: PrepareConfig) -> None:
    """ValueError where a feature has the name of a column that a dataset folder has anyway."""
    taken = sorted(RESERVED.intersection(config.feature_columns))
    if taken:
        raise ValueError(
            f"feature_columns names {', '.join(taken)}, which a dataset folder uses itself: rename the column in "
            f"{config.source}"
        )


def about(config: PrepareConfig) -> dict[str, Any]:
    """What is known of the log besides its events."""
    notes = () if config.timestamp_column else ("no timestamp_column was given: the order of the file is the time",)
    return {"item_metadata": _item_metadata(config), "source": str(Path(config.source or "")), "notes": notes}


def _item_metadata(config: PrepareConfig) -> pa.Table | None:
    if config.item_metadata is None:
        return None
    path = Path(config.item_metadata)
    key = config.item_metadata_id or config.item_column
    table = read_table(path, (key,))
    column(table, key, path, "item_metadata_id")
    renamed = {key: "item_id"}
    if config.title_column and config.title_column != key:
        column(table, config.title_column, path, "title_column")
        renamed[config.title_column] = "title"
    others = [name for name in table.column_names if name not in renamed and name not in renamed.values()]
    table = table.select([*renamed, *others])
    return table.rename_columns([*renamed.values(), *others])
