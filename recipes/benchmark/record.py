"""Appends finished training runs of retrieval models to the results of this repository, one CSV row for each.

    python -m grzoo.recipes.benchmark.record outputs/hstu_ml1m outputs/sasrec_ml1m

Everything is read from the run's folder: metrics.jsonl, report.md and export/. Then `python -m
grzoo.recipes.benchmark.tables` makes the tables of the READMEs. A run is recorded once.
"""

import argparse
import csv
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grzoo.recipes.metrics_log import read_metrics
from grzoo.recipes.parsing import find_config
from grzoo.recipes.provenance import device
from grzoo.recipes.runtime import UserError
from grzoo.recipes.settings import Settings, read_settings

from .reporting import append_rows

RESULTS = Path(__file__).with_name("results") / "retrieval.csv"
METRICS = ("hr@5", "ndcg@5", "hr@10", "ndcg@10", "mrr", "hr@50", "hr@200", "ndcg@200")
COLUMNS = (
    ("model", "dataset", "protocol", "exclude_seen", "loss", "epochs", "best_epoch", "seed", "ranks", *METRICS)
    + ("popularity_hr@10", "popularity_ndcg@10", "recipe", "changes", "seconds")
    + ("device", "torch", "deepspeed", "grzoo", "commit")
)
# What does not change what a run computes, and what has a column of its own.
_NOT_A_CHANGE = {
    *("config", "output_dir", "dataset_dir", "source", "seed", "num_train_epochs", "save_strategy", "save_steps"),
    *("save_total_limit", "resume_from_checkpoint", "logging_steps", "disable_tqdm", "report_to", "use_cpu"),
    *("deepspeed_config", "dataloader_num_workers", "eval_batch_size", "top_k", "exclude_seen"),
}
_EVALUATIONS = {"eval_strategy", "eval_steps", "eval_epochs"}  # change a result only where they choose the best model


def row_of(folder: Path, *, commit: str | None = None) -> dict[str, Any]:
    """The row of a finished run.

    Args:
        folder: `output_dir` of the run.
        commit: of the code, for a report that does not say it.

    Raises:
        UserError: the run is not finished, or says no commit.
    """
    for name in ("metrics.jsonl", "report.md", "export/config.json", "export/schema.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no finished run of train.py: it has no {name}")
    lines, conditions = read_metrics(folder / "metrics.jsonl"), _conditions(folder / "report.md")
    config, schema = (json.loads((folder / "export" / f"{name}.json").read_text()) for name in ("config", "schema"))
    last = lines[-1]
    if "test/ndcg@10" not in last:
        raise UserError(f"{folder} has no test/ndcg@10: only retrieval runs that rank to the tenth place are recorded")
    words = shlex.split(conditions["command"])[1:]
    settings = _settings(words)
    commit = commit or conditions.get("commit")
    if commit is None:
        raise UserError(f"{folder / 'report.md'} does not say the commit of the code: give --commit")
    validation = "validation event" if schema["split"].get("validation") == "last" else "no validation event"
    if schema["split"]["kind"] != "leave_one_out":
        raise UserError(f"{folder} is split {schema['split']['kind']!r}; the results are of leave_one_out")
    seen = "left out" if settings.evaluation.exclude_seen else "kept in"
    return {
        "model": config["model_type"],
        "dataset": schema["name"],
        "protocol": f"leave-one-out, {validation}, full ranking, seen {seen}",
        "exclude_seen": str(settings.evaluation.exclude_seen).lower(),
        "loss": loss_of(config),
        "epochs": _epochs(settings, last),
        "best_epoch": _number(last["best/epoch"]) if "best/epoch" in last else "",
        "seed": settings.training.seed,
        "ranks": int(conditions["ranks"].split()[0]),
        **{name: _share(last.get(f"test/{name}")) for name in METRICS},
        **{f"popularity_{name}": _share(last.get(f"test/popularity/{name}")) for name in ("hr@10", "ndcg@10")},
        "recipe": f"{Path(settings.common.config).stem}.yaml" if settings.common.config else "",
        "changes": _changes(words, chooses="best/epoch" in last),
        "seconds": round(_seconds(lines, conditions)),
        "device": _device(conditions),
        **{name: _version(conditions, name) for name in ("torch", "deepspeed", "grzoo")},
        "commit": commit,
    }


def loss_of(config: dict[str, Any]) -> str:
    """The loss of an exported model in words, from its config.json."""
    kind = config.get("loss", "softmax")  # HSTU has this one alone
    if kind == "softmax" and config["negative_sampling"] == "all":
        return "full softmax"
    name = {"softmax": "sampled softmax", "bce": "BCE", "gbce": "gBCE"}[kind]
    number = config["num_negatives"]
    return f"{name}, {number} {config['negative_sampling']} negative{'s' if number > 1 else ''}"


def record(rows: Sequence[dict[str, Any]], path: Path) -> int:
    """Appends the rows that the CSV does not hold; returns how many."""
    known: list[dict[str, str]] = []
    if path.exists():
        with open(path, newline="") as file:
            known = list(csv.DictReader(file))
    new = [row for row in rows if {name: str(row[name]) for name in COLUMNS} not in known]
    if new:
        append_rows(new, path)
    return len(new)


def _conditions(report: Path) -> dict[str, str]:
    """The first table of a report."""
    rows = re.findall(r"^\| (.+?) \| (.*) \|$", report.read_text().partition("\n## ")[0], re.MULTILINE)
    return dict(rows[2:])


def _settings(words: Sequence[str]) -> Settings:
    """The settings of the run's command; a YAML that is not here stands for the built-in one of its name."""
    words = list(words)
    if "--config" in words:
        at = words.index("--config") + 1
        if not Path(words[at]).is_file():
            words[at] = str(find_config(Path(words[at]).stem))
    return read_settings(words)


def _changes(words: Sequence[str], *, chooses: bool) -> str:
    """What the command line changed of the recipe, and the results table does not show: "name value, ..."."""
    changes: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            changes[name] = [value] if value else []
        elif changes:
            changes[name].append(word)
    hidden = _NOT_A_CHANGE if chooses else _NOT_A_CHANGE | _EVALUATIONS
    return ", ".join(" ".join([name, *values]) for name, values in changes.items() if name not in hidden)


def _epochs(settings: Settings, last: dict[str, Any]) -> str:
    """Passes over the training users, at most: training may have stopped early."""
    return _number(last["epoch"] if settings.training.max_steps > 0 else settings.training.num_train_epochs)


def _seconds(lines: Sequence[dict[str, Any]], conditions: dict[str, str]) -> float:
    """Wall time of the training steps, without evaluations and saving."""
    match = re.search(r"([\d,]+) users", conditions["data"])
    assert match is not None
    users, seconds, epoch = int(match[1].replace(",", "")), 0.0, 0.0
    for line in lines:
        if "train/users_per_second" in line:
            seconds += (line["epoch"] - epoch) * users / line["train/users_per_second"]
            epoch = line["epoch"]
    return seconds


def _device(conditions: dict[str, str]) -> str:
    """The report's; one that does not say it was written on this machine."""
    words = conditions["machine"].split(", ")
    return ", ".join(words[:-2]) if len(words) > 2 else device()


def _version(conditions: dict[str, str], package: str) -> str:
    match = re.search(rf"\b{package} ([^,]+)", conditions["versions"])
    return match[1] if match else ""


def _number(value: float) -> str:
    return f"{value:g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}".removeprefix("0")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output_dir of finished runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV to append to (default: the repository's)")
    parser.add_argument("--commit", help="of the code, for runs whose report does not say it")
    arguments = parser.parse_args(argv)
    try:
        rows = [row_of(folder, commit=arguments.commit) for folder in arguments.folders]
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{record(rows, arguments.results)} of {len(rows)} runs were new; {arguments.results}")


if __name__ == "__main__":
    main()
