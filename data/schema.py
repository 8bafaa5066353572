"""What a dataset folder says of itself: `schema.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
SCHEMA_FILE = "schema.json"
ITEMS_FILE = "items.parquet"
ID_MAPPINGS = ("identity", "vocabulary", "hash")
FEATURE_DTYPES = ("int8", "int16", "int32", "int64", "float32", "float64", "bool")


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """One list column of the event rows: its name and the dtype of an event's value."""

    name: str
    dtype: str

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a feature needs a name, got ''")
        if self.dtype not in FEATURE_DTYPES:
            raise ValueError(f"feature {self.name!r} has dtype {self.dtype!r}; events hold {', '.join(FEATURE_DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class DatasetSchema:
    """Schema of a dataset folder.

    name: the data set's name.  features: the list columns, `item_id` first.
    id_mapping: how an item's original id became its int64 model id: "identity" (it was that integer), "vocabulary"
    (its number in `items.parquet`) or "hash" (xxh3_64 of its UTF-8 text, as a signed integer).
    user_id_dtype: "int64" or "string".  split: kind and arguments of the split.  statistics: users, items, events per
    split. source: where the events came from, in words.  ranking: which event columns are what to a ranking model:
    tasks, user_features, event_features, item_features, cross_features; empty when the folder was prepared without.
    options: of the preparation, those that are not the default; None in folders of earlier versions.
    """

    name: str
    features: tuple[FeatureSpec, ...]
    id_mapping: str
    user_id_dtype: str = "int64"
    split: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    ranking: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"schema has format_version {self.format_version}, this version of grzoo reads {FORMAT_VERSION}: "
                "prepare the data again or update grzoo"
            )
        if self.id_mapping not in ID_MAPPINGS:
            raise ValueError(f"id_mapping is {self.id_mapping!r}; it is one of {', '.join(ID_MAPPINGS)}")
        if self.user_id_dtype not in ("int64", "string"):
            raise ValueError(f"user_id_dtype is {self.user_id_dtype!r}; it is 'int64' or 'string'")
        if not self.features or self.features[0] != FeatureSpec(name="item_id", dtype="int64"):
            raise ValueError("the first feature of a schema is item_id of dtype int64")
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            raise ValueError(f"feature names repeat: {names}")

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the list columns, `item_id` first."""
        return tuple(feature.name for feature in self.features)

    @property
    def has_timestamps(self) -> bool:
        """Whether events carry a `timestamp`."""
        return "timestamp" in self.feature_names

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `schema.json`."""
        values = asdict(self)
        values["features"] = [asdict(feature) for feature in self.features]
        return {"format_version": values.pop("format_version"), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DatasetSchema":
        """The schema of a JSON object; ValueError on fields that are missing, unknown or wrong."""
        known = set(cls.__dataclass_fields__)
        unknown, missing = sorted(set(values) - known), sorted({"name", "features", "id_mapping"} - set(values))
        if unknown or missing:
            raise ValueError(f"{SCHEMA_FILE} does not fit: unknown fields {unknown}, missing fields {missing}")
        features = tuple(FeatureSpec(**feature) for feature in values["features"])
        return cls(**{**values, "features": features})

    def save(self, folder: str | Path) -> None:
        """Write `schema.json` into `folder`."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=False, ensure_ascii=False)
        (Path(folder) / SCHEMA_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "DatasetSchema":
        """Read `schema.json` of `folder`; FileNotFoundError when the folder is no dataset folder."""
        path = Path(folder) / SCHEMA_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: {folder} is not a dataset folder; make one with `recipes/prepare_data.py`"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); prepare the data again") from error
        return cls.from_dict(values)
