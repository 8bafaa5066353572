"""Labels of ranking tasks by split: a model learns the share of ones that it is shown."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from grzoo.data.jagged import ranges
from numpy.typing import NDArray

from .log import GroupedLog
from .splits import Split, SplitRows

Shares = Mapping[str, Mapping[str, Mapping[str, float]]]  # task -> split -> "known" of the targets, "ones" of the known

_FAR = 0.2  # between the shares of ones of two splits: more than a log drifts


def label_shares(grouped: GroupedLog, split: Split) -> Shares:
    """Return, by task and split, the share of targets whose label is known, and that of ones among those."""
    return {
        task: {name: _shares(grouped, task, rows) for name, rows in split.rows.items()}
        for task in grouped.ranking.get("tasks", ())
    }


def _shares(grouped: GroupedLog, task: str, rows: SplitRows) -> dict[str, float]:
    first, counts = grouped.offsets[rows.user] + rows.target_from, np.maximum(rows.length - rows.target_from, 0)
    labels = grouped.columns[task][ranges(first, counts)]
    known = labels[labels >= 0]
    return {"known": _mean(labels >= 0, of_none=1.0), "ones": _mean(known, of_none=0.0)}


def _mean(values: NDArray[Any], of_none: float) -> float:
    return round(float(values.mean()), 4) if len(values) else of_none


def label_lines(shares: Shares) -> list[str]:
    """The shares as text, a line per task."""
    return [
        f"{task}: " + ", ".join(f"{name} {_text(of_split)}" for name, of_split in by_split.items())
        for task, by_split in shares.items()
    ]


def _text(of_split: Mapping[str, float]) -> str:
    known = "" if of_split["known"] == 1 else f" of the {of_split['known']:.1%} that are known"
    return f"{of_split['ones']:.1%} ones{known}"


def label_remarks(shares: Shares) -> list[str]:
    """What would make a model's probabilities wrong: labels that are known for a choice of the events."""
    remarks = []
    for task, by_split in shares.items():
        is_complete = all(of_split["known"] == 1 for of_split in by_split.values())
        ones = [of_split["ones"] for of_split in by_split.values() if of_split["known"] > 0]
        if is_complete or max(ones, default=0) - min(ones, default=0) < _FAR:
            continue
        remarks.append(
            f"the known labels of {task} are ones in {min(ones):.1%} to {max(ones):.1%} of the targets, by split: "
            "where ratings are missing by their value, a model learns wrong probabilities (AUC suffers less)"
        )
    return remarks
