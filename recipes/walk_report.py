"""Report and plot of a walk over the periods of a log, made from metrics.jsonl alone."""

import csv
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .metrics_log import read_metrics
from .provenance import commit, device

_COLUMNS = ("events", "users", "new_users", "new_items", "targets")
_METRICS = ("ndcg@10", "hr@10", "hr@50", "mrr")


def periods_of(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that evaluate a period, in order."""
    return [line for line in read_metrics(output_dir / "metrics.jsonl") if "period" in line]


def mean_over_targets(lines: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """Mean of every metric `prefix`NAME over all targets of the periods, by NAME; empty where none was evaluated."""
    evaluated = [line for line in lines if line["period/targets"]]
    total = sum(line["period/targets"] for line in evaluated)
    names = [name for name in (evaluated[0] if evaluated else {}) if name.startswith(prefix)]
    return {
        name.removeprefix(prefix): sum(line[name] * line["period/targets"] for line in evaluated) / total
        for name in names
    }


def write_walk_report(output_dir: Path, *, title: str, conditions: Mapping[str, Any]) -> Path:
    """Write `output_dir/report.md` (conditions, a row per period, means, a plot with matplotlib) and periods.csv."""
    lines = periods_of(output_dir)
    shown = [name for name in _METRICS if any(f"eval/{name}" in line for line in lines)]
    header = ["period", *_COLUMNS, *shown, *(f"popularity {name}" for name in shown[:2])]
    rows: list[list[Any]] = [header, ["---"] * len(header)]
    for line in lines:
        numbers = [line[f"period/{name}"] for name in _COLUMNS]
        metrics = [_show(line.get(f"eval/{name}")) for name in shown]
        rows.append([line["period"], *numbers, *metrics, *(_show(line.get(f"popularity/{n}")) for n in shown[:2])])
    ours, popular = (mean_over_targets(lines, prefix) for prefix in ("eval/", "popularity/"))
    totals = [sum(line[f"period/{name}"] for line in lines) for name in _COLUMNS]
    means = [_show(ours.get(name)) for name in shown] + [_show(popular.get(name)) for name in shown[:2]]
    rows.append(["all", *totals, *means])
    parts = [f"# {title}", _table([["condition", "value"], ["---", "---"], *conditions.items()])]
    parts += ["## Every period, before it was trained", _table(rows)]
    if _plot(output_dir / "periods.png", lines):
        parts.append("![periods](periods.png)")
    _write_csv(output_dir / "periods.csv", lines)
    path = output_dir / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """The periods as CSV rows that carry their conditions."""
    about = {"device": device(), "torch": version("torch"), "grzoo": version("grzoo"), "commit": commit()}
    names = list(dict.fromkeys(name for line in lines for name in line if name != "epoch"))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *about], lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**line, **about} for line in lines)


def _plot(path: Path, lines: Sequence[Mapping[str, Any]]) -> bool:
    evaluated = [line for line in lines if line.get("eval/ndcg@10") is not None]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not evaluated:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    metric, volume = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    names = [line["period"] for line in evaluated]
    for prefix, label in (("eval", "model"), ("popularity", "popularity")):
        metric.plot(names, [line[f"{prefix}/ndcg@10"] for line in evaluated], marker=".", label=label)
    metric.set_ylabel("NDCG@10")
    metric.legend()
    metric.grid(alpha=0.3)
    volume.bar(names, [line["period/targets"] for line in evaluated])
    volume.set_ylabel("targets")
    volume.set_xticks(range(0, len(names), max(1, len(names) // 12)))
    volume.tick_params(axis="x", rotation=45)
    FigureCanvasAgg(figure).print_png(path)
    return True


def _table(rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def _show(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"
