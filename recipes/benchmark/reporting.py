"""What every benchmark writes: CSV rows that carry their conditions, and the last line of JSON."""

import csv
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grzoo.recipes.provenance import commit, device


def conditions() -> dict[str, Any]:
    """Return device, versions, commit and threads of this run, the same columns in every CSV."""
    return {
        "device": device(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "grzoo": version("grzoo"),
        "commit": commit(),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, 10th and 90th percentile of repeated times, in milliseconds."""
    low, median, high = np.percentile(np.asarray(seconds) * 1e3, [10, 50, 90])
    return {"median_ms": round(median, 3), "p10_ms": round(low, 3), "p90_ms": round(high, 3)}


def write_rows(rows: Sequence[dict[str, Any]], path: Path | None) -> None:
    """Print the rows as CSV, and append them to the file at `path`, under the columns that it has.

    Raises:
        ValueError: the file lacks a column.
    """
    rows = [row | conditions() for row in rows]
    _write(rows, sys.stdout, list(rows[0]), header=True)
    if path is not None:
        append_rows(rows, path)


def append_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Append rows that carry their conditions already; see `write_rows`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    columns = list(rows[0]) if is_new else path.read_text().partition("\n")[0].split(",")
    with open(path, "a", newline="") as file:
        _write(rows, file, columns, header=is_new)


def print_headline(figures: dict[str, Any]) -> None:
    """Print the headline figures by name: the last line of the output."""
    print(json.dumps(figures), flush=True)


def _write(rows: Sequence[dict[str, Any]], file: Any, columns: Sequence[str], *, header: bool) -> None:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
