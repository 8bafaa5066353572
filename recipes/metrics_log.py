"""metrics.jsonl: one JSON object a line, the single source of the report, the plots and the tracker."""

import importlib.util
import json
import logging
import math
from pathlib import Path
from typing import Any

from .runtime import UserError

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends lines to `output_dir/metrics.jsonl`, on the main rank only.

    Args:
        output_dir: folder of the run; None (the other ranks): nothing is written.
        report_to: "tensorboard" also writes event files into `output_dir/tensorboard`.
    """

    def __init__(self, output_dir: Path | None, *, report_to: str = "none") -> None:
        self.path = None if output_dir is None else output_dir / "metrics.jsonl"
        self._writer = None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if report_to == "tensorboard":
            self._writer = _tensorboard(self.path.parent / "tensorboard")

    def start_at(self, step: int) -> None:
        """Drops lines that a run continuing at `step` will write again: later ones, and all for a new run (step 0)."""
        if self.path is not None:
            kept = [line for line in read_metrics(self.path) if step > 0 and line["step"] <= step]
            temporary = self.path.with_name(self.path.name + ".tmp")  # killed here, the run keeps its lines
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(self.path)

    def write(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """Appends `values` under "step" and "epoch"; numbers that are not finite become null.

        Where the disk is full a warning says so, and training goes on to the checkpoint before which it has to stop.
        """
        if self.path is None:
            return
        line = {"step": step, "epoch": round(epoch, 4), **{key: _json_value(value) for key, value in values.items()}}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            logger.warning("the metrics of step %d are lost: %s", step, error)
        for key, value in values.items():
            if self._writer is not None and isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flushes the tracker."""
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics.jsonl; none when the file is missing."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # the run was killed while it wrote this line
    return lines


def evaluation_before(path: Path, step: int | None) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of the last evaluation up to a step (None: of all) in a metrics.jsonl, and those of popularity.

    Both are by bare name ("ndcg@10"), and empty where nothing was evaluated.
    """
    metrics: dict[str, float] = {}
    baseline: dict[str, float] = {}
    for line in read_metrics(path):
        if step is not None and line["step"] > step:
            continue
        metrics = _named(line, "eval/") or metrics
        baseline = _named(line, "popularity/") or baseline
    return metrics, baseline if metrics else {}


def _named(line: dict[str, Any], prefix: str) -> dict[str, float]:
    """The metrics under a prefix; what an evaluation says beside them (seconds, unknown ids) is left out."""
    names = {key: key.removeprefix(prefix) for key, value in line.items() if isinstance(value, float)}
    beside = ("seconds", "unknown_rate/")
    return {name: line[k] for k, name in names.items() if k.startswith(prefix) and not name.startswith(beside)}


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def check_tracker(report_to: str) -> None:
    """Raises UserError, on every rank and before any work, for a tracker that is not installed."""
    if report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--report_to tensorboard needs the tensorboard package: pip install tensorboard")


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
