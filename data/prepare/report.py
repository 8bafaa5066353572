"""What was prepared: the numbers that are printed and the dataset card."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from .config import PrepareConfig
from .duplicates import count_duplicates
from .histogram import PLOT_FILE
from .labels import label_lines, label_remarks, label_shares
from .log import GroupedLog
from .splits import Split
from .writer import metadata_rows, short_source


@dataclass(frozen=True)
class Report:
    """Numbers of a prepared data set (JSON values), with `lines()` for people."""

    name: str
    output_dir: str
    source: str
    statistics: Mapping[str, Any]
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report as text lines."""
        values = self.statistics
        lines = [
            f"{self.name}: {values['users']:,} users, {values['items']:,} items, {values['events']:,} events",
            f"from {self.source}",
            "events per user: " + ", ".join(f"{key} {value:,}" for key, value in values["events_per_user"].items()),
        ]
        if "time_span" in values:
            lines.append(f"time span: {values['time_span'][0]} to {values['time_span'][1]}")
        for name, part in values["splits"].items():
            lines.append(f"{name}: {part['rows']:,} rows, {part['events']:,} events, {part['targets']:,} targets")
        return [*lines, *label_lines(values.get("labels", {})), *self.remarks]


def statistics_of(grouped: GroupedLog, split: Split) -> dict[str, Any]:
    """Users, items, events, length percentiles, time span; of every split rows, events, targets and labels."""
    lengths = grouped.lengths
    percentiles = {f"p{p}": round(float(np.percentile(lengths, p))) for p in (50, 90, 99)}
    values: dict[str, Any] = {
        "users": len(grouped.user_ids),
        "items": len(grouped.item_ids),
        "events": int(lengths.sum()),
        "events_per_user": {"mean": round(float(lengths.mean()), 1), **percentiles, "max": int(lengths.max())},
    }
    times = grouped.columns.get("timestamp")
    if times is not None:
        values["time_span"] = [_date(int(times.min())), _date(int(times.max()))]
        values["duplicate_events"] = count_duplicates(grouped)
    values["splits"] = {
        name: {
            "rows": len(rows.user),
            "events": int(rows.length.sum()),
            "targets": int(np.maximum(rows.length - rows.target_from, 0).sum()),
        }
        for name, rows in split.rows.items()
    }
    if grouped.ranking:
        values["labels"] = label_shares(grouped, split)
    return values


def _date(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s"


def report_of(config: PrepareConfig, grouped: GroupedLog, split: Split) -> Report:
    """The report of a prepared data set."""
    statistics = statistics_of(grouped, split)
    remarks = (*split.remarks, *grouped.notes, *_artefacts(grouped, statistics))
    return Report(config.name, str(config.output_dir), grouped.source, statistics, remarks)


def _artefacts(grouped: GroupedLog, statistics: Mapping[str, Any]) -> list[str]:
    """What looks like a mistake in the raw data, and was left as it is."""
    remarks = []
    if count := statistics.get("duplicate_events"):
        remarks.append(
            f"{count:,} events have the user, item and time of another one: they are kept; where they are no events of "
            "their own, drop them from the log, as a test event may repeat one of the history"
        )
    if grouped.item_metadata is not None:
        known, items = metadata_rows(grouped).drop_null(), len(grouped.item_ids)
        if len(known) < items:
            remarks.append(f"the item metadata have {len(known):,} of the {items:,} items: the others have no title")
    return remarks + label_remarks(statistics.get("labels", {}))


def card(report: Report, split: Split, id_mapping: str, has_plot: bool) -> str:
    """The dataset card: front matter by which `datasets.load_dataset` finds the splits, then the report."""
    files = "\n".join(f"  - split: {name}\n    path: data/{name}-*.parquet" for name in split.rows)
    arguments = ", ".join(f"{key} {value}" for key, value in split.arguments.items())
    lines = "\n".join(f"- {line}" for line in replace(report, source=short_source(report.source)).lines())
    return f"""---
configs:
- config_name: default
  data_files:
{files}
tags:
- recommendation
- sequential-recommendation
---

# {report.name}

{lines}

Split: {arguments}. One row per user, events oldest first; events from index `target_from` on are the targets of the
row. `items.parquet` is the catalogue; model ids come from the original item ids by {id_mapping}. `schema.json`
describes the columns.
{f"{chr(10)}![events per user]({PLOT_FILE}){chr(10)}" if has_plot else ""}"""
