"""Options of the preparation of a data set; the command line of `recipes/prepare_data.py` is made from them."""

from dataclasses import dataclass, field, fields
from typing import Any

SPLITS = ("leave_one_out", "temporal", "none")
VALIDATIONS = ("none", "last")
LEAST_MEMORY_GB = 0.6
_NOT_SHAPING = {"source", "overwrite", "max_memory_gb"}
TIMESTAMP_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def _option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class PrepareConfig:
    """What to prepare, from where, and how to split it. Every field is a command line option of the same name."""

    name: str = field(metadata={"help": "Data set: synthetic, ml-1m, amazon-beauty, event_log, ..."})
    output_dir: str = field(metadata={"help": "Dataset folder to make."})
    source: str | None = _option(None, "File or folder of the raw data; default: the official download.")
    overwrite: bool = _option(False, "Replace a dataset folder that exists.")
    split: str = _option(
        "leave_one_out",
        "leave_one_out (last event of each user), temporal (a cutoff for all users) or none (all is train).",
    )
    validation: str = _option("none", "none, or last: hold out what precedes the test events in the same way.")
    cutoff: int | None = _option(None, "temporal: events from this time on (seconds since 1970) are test events.")
    test_fraction: float = _option(
        0.1, "temporal without a cutoff: this share of the events, the latest, are test events."
    )
    k_core: int = _option(0, "Drop users and items with fewer events than this, repeatedly, until none is left.")
    ranking: bool = _option(
        False, "Also make what ranking models read: labels, actions, genres, profiles, cross features of the past."
    )
    id_mapping: str | None = _option(
        None, "Original item id -> model id: identity (integers), hash (text, 64 bits) or vocabulary (numbers from 1)."
    )
    seed: int = _option(0, "synthetic: the seed.")
    num_users: int = _option(2_000, "synthetic: users.")
    num_items: int = _option(1_000, "synthetic: items.")
    mean_length: float = _option(40.0, "synthetic: mean number of events of a user.")
    category: str | None = _option(None, "amazon: category as in the file names, such as Books.")
    user_column: str = _option("user_id", "event_log: column of the user id.")
    item_column: str = _option("item_id", "event_log: column of the item id.")
    timestamp_column: str | None = _option(
        None, "event_log: column of the time; without it the file's order is the time."
    )
    timestamp_unit: str = _option("s", "event_log: unit of integer times: s, ms, us or ns.")
    feature_columns: list[str] = _option([], "event_log: numeric columns to keep for each event, such as a label.")
    item_metadata: str | None = _option(None, "event_log: CSV or Parquet file with a row per item.")
    item_metadata_id: str | None = _option(None, "event_log: its column of item ids; default: the name of item_column.")
    max_memory_gb: float | None = _option(
        None,
        "event_log: group out of core within about this much memory, on disk beside output_dir; a killed call goes on "
        "where it was. Default: all in memory.",
    )
    title_column: str | None = _option(None, "event_log: its column of titles; default: title, where there is one.")

    def __post_init__(self) -> None:
        _one_of("split", self.split, SPLITS)
        _one_of("validation", self.validation, VALIDATIONS)
        _one_of("timestamp_unit", self.timestamp_unit, tuple(TIMESTAMP_UNITS))
        if not 0 < self.test_fraction < 0.5:
            raise ValueError(f"test_fraction must lie between 0 and 0.5, got {self.test_fraction}")
        if self.max_memory_gb is not None and self.max_memory_gb < LEAST_MEMORY_GB:
            raise ValueError(f"max_memory_gb must be at least {LEAST_MEMORY_GB}, got {self.max_memory_gb}")
        for name, least in (("num_users", 1), ("num_items", 1), ("k_core", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.mean_length > 0:
            raise ValueError(f"mean_length must be positive, got {self.mean_length}")

    def changed(self) -> set[str]:
        """Names of the options that differ from their defaults."""
        fresh = PrepareConfig(name=self.name, output_dir=self.output_dir)
        return {entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(fresh, entry.name)}

    def shaping(self) -> dict[str, Any]:
        """The options other than their defaults that decide what a dataset folder of this log holds."""
        return {name: getattr(self, name) for name in sorted(self.changed() - _NOT_SHAPING)}


def without_effect(config: PrepareConfig) -> dict[str, str]:
    """Options that were set and that the other ones leave without effect -> why."""
    temporal, given = config.split == "temporal", config.cutoff is not None
    cases = {
        "cutoff": (not temporal, f"with split {config.split}: it is for split temporal"),
        "test_fraction": (not temporal or given, "beside a cutoff" if temporal else f"with split {config.split}"),
        "validation": (config.split == "none", "with split none, which holds nothing out"),
        "timestamp_unit": (config.timestamp_column is None, "without a timestamp_column"),
        "item_metadata_id": (config.item_metadata is None, "without item_metadata"),
        "title_column": (config.item_metadata is None, "without item_metadata"),
        "k_core": (config.k_core == 1, "when it is 1: every user and item has an event"),
    }
    changed = config.changed()
    return {name: why for name, (idle, why) in cases.items() if idle and name in changed}


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(allowed)}")
