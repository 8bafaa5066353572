"""report.md and its plots, made from metrics.jsonl alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .metrics_log import read_metrics

PHASES = ("data", "prepare", "fetch", "forward", "backward", "reduce", "dense_step", "sparse_step")
_TABLE = ("ndcg@10", "hr@10", "hr@50", "hr@200", "mrr", "auc", "gauc", "logloss", "ne")


def write_report(output_dir: Path, *, title: str, conditions: dict[str, Any]) -> Path:
    """Writes `output_dir/report.md`, with PNG plots beside it when matplotlib is installed.

    Args:
        output_dir: folder of a run, with its metrics.jsonl.
        title: first line.
        conditions: what the run was made with; one row each.

    Returns:
        The path of the report.
    """
    lines = read_metrics(output_dir / "metrics.jsonl")
    parts = [f"# {title}", _rows(("condition", "value"), [(k, v) for k, v in conditions.items()])]
    evaluations = [line for line in lines if any(key.startswith("eval/") for key in line)]
    if evaluations:
        parts += ["## Ranking metrics", _evaluation_table(evaluations, lines)]
    training = [line for line in lines if "train/loss" in line]
    if training:
        parts += ["## Time per step", _phase_table(training)]
    parts += [f"![{path.stem}]({path.name})" for path in _plots(output_dir, training, evaluations)]
    path = output_dir / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def metrics_table(metrics: dict[str, float], baseline: dict[str, float]) -> str:
    """Text table of the model beside the baseline, one line per metric.

    Args:
        metrics: metric name -> value of the model.
        baseline: the same names -> value of the popularity baseline.
    """
    rows = [f"{'metric':<10} {'model':>8} {'popularity':>10}"]
    for name, value in metrics.items():
        other = f"{baseline[name]:10.4f}" if name in baseline else f"{'':>10}"
        rows.append(f"{name:<10} {value:8.4f} {other}")
    return "\n".join(rows)


def _evaluation_table(lines: Sequence[dict[str, Any]], all_lines: Sequence[dict[str, Any]]) -> str:
    names = [name for name in _TABLE if f"eval/{name}" in lines[-1]]
    rows = [(line["step"], line["epoch"], *(_show(line.get(f"eval/{name}")) for name in names)) for line in lines]
    popular = next((line for line in all_lines if f"popularity/{names[0]}" in line), None) if names else None
    if popular is not None:
        rows.append(("popularity", "", *(_show(popular.get(f"popularity/{name}")) for name in names)))
    return _rows(("step", "epoch", *names), rows)


def _phase_table(lines: Sequence[dict[str, Any]]) -> str:
    # The first line holds allocations and first uses: kept only when it is the only one.
    steady = lines[1:] or lines
    rows = []
    for phase in PHASES:
        seconds = [line[f"train/seconds_{phase}"] for line in steady if f"train/seconds_{phase}" in line]
        if seconds:
            rows.append((phase, f"{1000 * sum(seconds) / len(seconds):.2f}"))
    return _rows(("phase", "milliseconds (mean)"), rows)


def _plots(output_dir: Path, training: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> list[Path]:
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    written = []
    if training:
        written.append(_plot(output_dir / "loss.png", training, ["train/loss"]))
        written.append(_plot(output_dir / "throughput.png", training, ["train/tokens_per_second"]))
    if evaluations:
        shown = ["eval/auc", "eval/gauc"] if "eval/auc" in evaluations[-1] else ["eval/ndcg@10", "eval/hr@10"]
        written.append(_plot(output_dir / "ranking.png", evaluations, shown))
    return written


def _plot(path: Path, lines: Sequence[dict[str, Any]], keys: Sequence[str]) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for key in keys:
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], marker=".", label=key)
    axes.set_xlabel("step")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _rows(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in cells)


def _show(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"
