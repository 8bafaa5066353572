"""Whether a model knows the items of a data set: one that does not ranks them all the same, by nothing it learned."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from grzoo.data import Catalogue
from grzoo.data.schema import ITEMS_FILE, SCHEMA_FILE
from grzoo.models.item_table import ITEM_TABLE

from .dataset_folder import LoadedData
from .loading import checkpoint_state, is_checkpoint

_FEW = 0.5


def strangers(model: Any, path: Path, data: LoadedData) -> list[str]:
    """What makes the items of `data` look like others than those that the model in `path` was trained on. Collective.

    Only signs that are sure to matter: most items without a row, another number in a vocabulary, a log of another name.
    """
    lines = []
    rows = model.embeddings.ids(ITEM_TABLE).cpu().numpy()
    known = model.embeddings.exchange.sum_int(int(np.isin(data.catalogue.ids, rows).sum()))
    items, name = len(data.catalogue), _log_name(path)
    if known < _FEW * items:
        lines.append(
            f"the model has rows of {known:,} of the {items:,} items of {data.folder}; it has learned nothing of the "
            "others: give the data set it was trained on, or one with the same item ids"
        )
    if name is not None and name != data.schema.name:
        lines.append(f"the model was trained on {name}, {data.folder} is {data.schema.name}: have items the same ids?")
    if data.catalogue.id_mapping == "vocabulary" and (path / ITEMS_FILE).is_file():
        same = _same_numbers(Catalogue.from_folder(path), data.catalogue)
        if same < items:
            lines.append(
                f"{items - same:,} of the {items:,} items of {data.folder} have another number in the model's "
                "vocabulary: give the data set it was trained on"
            )
    return lines


def _same_numbers(own: Catalogue, other: Catalogue) -> int:
    if own.original_ids.type != other.original_ids.type:
        return 0
    ids, known = own.encode(other.original_ids.to_pylist())
    return int((known & (ids == other.ids)).sum())


def _log_name(path: Path) -> str | None:
    """The name of the log that a model was trained on, where its folder says so."""
    if is_checkpoint(path):
        name = (checkpoint_state(path).get("data") or {}).get("name")
    else:
        file = path / SCHEMA_FILE
        name = json.loads(file.read_text()).get("name") if file.is_file() else None
    return None if name is None else str(name)
