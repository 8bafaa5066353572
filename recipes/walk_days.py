"""Trains on a log as it grows: each calendar period is evaluated first, then trained, with all older events as context.

    python recipes/walk_days.py --config recipes/configs/walk_ml_latest_small.yaml --output_dir outputs/walk
    deepspeed --num_accelerators 2 recipes/walk_days.py --config walk_ml_latest_small --walk_from 2015-01-01 \\
        --output_dir outputs/walk

The events before the first period are trained for `--num_train_epochs`. Then for every period: its events are appended
to the dataset folder (active users' pasts are joined, new items join the catalogue), the model and popularity rank its
events among all items known by its end, and the model trains on it for `--epochs_per_period`. Settings are those of
train.py; `output_dir` gets metrics.jsonl with a line per period, report.md with a plot, checkpoints and export/. A run
that was stopped goes on with `--resume_from_checkpoint last`.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from grzoo.data import Catalogue, DatasetSchema, EventDataset
from grzoo.data.prepare import days, read_log
from grzoo.recipes.arguments import TrainingArguments, option
from grzoo.recipes.assembly import build_engine, build_loader, build_model, build_model_config
from grzoo.recipes.dataset_folder import LoadedData, check_options, load, source_of
from grzoo.recipes.deepspeed_config import resolve
from grzoo.recipes.evaluation import Evaluator
from grzoo.recipes.exporting import export
from grzoo.recipes.metrics_log import MetricsLog
from grzoo.recipes.no_effect import without_effect
from grzoo.recipes.output_folder import check_run_folder, make_run_folder
from grzoo.recipes.periods import PeriodLog, WalkArguments
from grzoo.recipes.provenance import versions
from grzoo.recipes.ranking import is_ranking
from grzoo.recipes.report import metrics_table
from grzoo.recipes.runtime import Runtime, UserError, connect, run, user_errors
from grzoo.recipes.settings import Settings, read_settings
from grzoo.recipes.summary import describe
from grzoo.recipes.training import TrainingLoop, checkpoint_to_resume, total_steps
from grzoo.recipes.walk_report import mean_over_targets, periods_of, write_walk_report

_SEED_STRIDE = 1_000_003  # a period's keys of dropout, negatives and order are not those of another one


@dataclass
class PeriodTraining:
    """How long each period is trained."""

    epochs_per_period: float = option(1.0, "Passes over the events of a period, once it has been evaluated.")


class Walk:
    """A model on its way through the periods of a log. `stage` 0 trains what came before, stage k the k-th period."""

    def __init__(self, settings: Settings, runtime: Runtime, periods: PeriodLog, argv: list[str]) -> None:
        self.settings, self.runtime, self.periods = settings, runtime, periods
        self.output_dir = Path(settings.training.output_dir or "")
        self.folder = Path(settings.data.dataset_dir or self.output_dir / "dataset")
        self.command = " ".join(["walk_days.py", *(word for word in argv if not word.startswith("--local_rank"))])
        self.stage, self.step, self.loader_state = 0, 0, None
        check_run_folder(self.output_dir, self.folder, resumes=settings.training.resume_from_checkpoint is not None)
        self._first("output_dir", lambda: make_run_folder(self.output_dir))
        resume_from = checkpoint_to_resume(settings.training)
        self._first("walk", lambda: periods.make(self.folder, settings.data.log_name, resume_from is not None))
        data = load(self.folder)
        self.config = build_model_config(settings, has_timestamps=True, num_items=len(data.catalogue))
        with user_errors():
            options = settings.training.deepspeed_config, settings.step, settings.optimizer, runtime.world_size
            self.engine = build_engine(settings, build_model(settings, self.config), resolve(*options), 1)
        self.conditions = describe(settings, data, self.engine, 0, runtime)
        if resume_from is not None:
            self._resume(resume_from)
        self.log = MetricsLog(self.output_dir if runtime.is_main else None, report_to=settings.training.report_to)
        self.log.start_at(self.step)

    def run(self) -> None:
        """Train, then evaluate and train period after period, to the last one."""
        self._train("train", self.settings.training.num_train_epochs)
        for number in range(max(0, self.stage - 1), len(self.periods.names)):
            split = self._first(f"period {number}", lambda n=number: self.periods.append(self.folder, n))
            self._evaluate(split, number)
            if self.stage < number + 1:
                self.stage, self.loader_state = number + 1, None
            self._train(split, self.settings.more[1].epochs_per_period)
        self.log.close()

    def finish(self) -> None:
        """The export, the report and the means over all periods."""
        data = load(self.folder)
        lines = periods_of(self.output_dir) if self.runtime.is_main else []
        ours, popular = (mean_over_targets(lines, prefix) for prefix in ("eval/", "popularity/"))
        about: Any = {"metrics": ours, "baseline": popular, "conditions": self.conditions, "command": self.command}
        export(self.engine, data, self.output_dir / "export", **about, split="walked")
        if self.runtime.is_main:
            title = f"{type(self.engine.module).__name__} walks {data.schema.name}"
            conditions = {**self.conditions, **versions(), "command": self.command}
            report = write_walk_report(self.output_dir, title=title, conditions=conditions)
            print(f"\nmean over all targets of {len(lines)} periods, each before it was trained")
            print(f"{metrics_table(ours, popular)}\nreport {report}", flush=True)

    def _resume(self, folder: Path) -> None:
        with user_errors():
            path, state = self.engine.load_checkpoint(folder)
        if "stage" not in state:
            raise UserError(f"{path} was not written by walk_days.py: it is at no period")
        self.stage, self.step, self.loader_state = int(state["stage"]), int(state["step"]), state["loader"]
        # Told before the lines of metrics.jsonl that are later than the checkpoint are dropped.
        if any(line["step"] > self.step for line in self._lines()):
            raise UserError(_later_periods(self.folder))
        self.runtime.say(f"resumed at step {self.step}, stage {self.stage} of {len(self.periods.names)}, from {path}")

    def _check_no_later(self, stage: int) -> None:
        """UserError where an older checkpoint was resumed, whose model would meet items of later periods."""
        if len(days(self.folder)) > stage:
            raise UserError(_later_periods(self.folder))

    def _first(self, name: str, work: Any) -> str:
        """`work` on the main rank while the others wait."""
        with user_errors():
            return self.runtime.main_first(name, lambda: str(work()))

    def _train(self, split: str, epochs: float) -> None:
        """The steps that are left of the split, if `stage` is its. Raises UserError where later periods are known."""
        number = 0 if split == "train" else int(split.removeprefix("day_"))
        if self.stage != number:
            return
        data = self._data(split)
        seed = self.settings.training.seed + _SEED_STRIDE * number
        training = replace(self.settings.training, seed=seed, eval_strategy="no", num_train_epochs=epochs)
        settings = replace(self.settings, training=training)
        if not (data.train.lengths > np.maximum(data.train.target_from, 1)).any():
            return
        loader = build_loader(settings, data, self.config, self.runtime)
        done = 0
        if self.loader_state is not None:
            loader.load_state_dict(self.loader_state)
            done = loader.sampler.step_at(self.loader_state["epoch"], self.loader_state["cursor"])
        steps_left = total_steps(training, len(loader.sampler)) - done
        if steps_left > 0:
            self._first(f"no later than {number}", lambda: self._check_no_later(number))
        identity = {
            "model_config": json.loads(self.config.to_json_string(use_diff=False)),
            "dataset_dir": str(self.folder),
            "command": self.command,
            "stage": number,
        }
        loop = TrainingLoop(
            self.engine,
            loader,
            training,
            self.log,
            self.runtime,
            total_steps=self.step + steps_left,
            evaluate=dict,
            identity=identity,
        )
        loop.step = self.step
        loop.saved_step = self.step if self.loader_state is not None else None
        loop.run()
        self.step = loop.step

    def _evaluate(self, split: str, number: int) -> None:
        """Rank the events of the period by the model and by what was popular before it. Collective.

        Raises UserError where later periods are known.
        """
        if self.stage > number:
            return  # its training has begun
        name = self.periods.names[number]
        seen = self.runtime.main_first(f"seen {number}", lambda: str(any(x["period"] == name for x in self._lines())))
        if seen == "True":
            return  # evaluated before this run was stopped
        self._first(f"ranked no later than {number}", lambda: self._check_no_later(number + 1))
        data = self._data(split)
        catalogue = _with_counts(data.catalogue, self.periods.counts_before(data.catalogue, number))
        with user_errors():
            evaluator = Evaluator(
                self.folder,
                split,
                catalogue,
                self.settings.evaluation,
                self.runtime,
                max_length=self.settings.data.max_length,
                max_tokens=self.settings.step.max_tokens_per_device,
                cost=self.config.flops,
            )
        line: dict[str, Any] = {"period": name, **_named("period", self.periods.describe(number))}
        line |= {"period/targets": evaluator.loader.num_targets, "period/catalogue": len(catalogue)}
        if evaluator.loader.num_targets:
            line |= _named("eval", evaluator(self.engine.module)) | _named("popularity", evaluator.popularity())
        self.log.write(self.step, 0.0, line)
        shown = f"{line.get('eval/ndcg@10', float('nan')):.4f} (popularity {line.get('popularity/ndcg@10', 0.0):.4f})"
        about = f"{line['period/targets']:,} targets, {line['period/new_items']:,} new items"
        self.runtime.say(f"{name}: {about}, ndcg@10 {shown}")

    def _lines(self) -> list[dict[str, Any]]:
        return periods_of(self.output_dir)

    def _data(self, split: str) -> LoadedData:
        with user_errors():
            schema, catalogue = DatasetSchema.load(self.folder), Catalogue.from_folder(self.folder)
            return LoadedData(self.folder, schema, catalogue, EventDataset.from_folder(self.folder, split))


def _named(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _later_periods(folder: Path) -> str:
    return (
        f"{folder} holds later periods than the checkpoint that is resumed: their items would be known too early; "
        "resume the last checkpoint, or walk anew"
    )


def _with_counts(catalogue: Catalogue, counts: Any) -> Catalogue:
    at = catalogue.table.column_names.index("count")
    return Catalogue(catalogue.table.set_column(at, "count", pa.array(counts)), catalogue.id_mapping)


def _check(settings: Settings) -> None:
    """UserError for settings of train.py that a walk cannot follow."""
    training, step = settings.training, settings.step
    if is_ranking(settings.model_options.get("model_type")):
        raise UserError("walk_days.py walks retrieval models; ranking models train by train.py")
    if settings.optimizer.lr_scheduler_type in ("linear", "cosine"):
        raise UserError(
            f"--lr_scheduler_type {settings.optimizer.lr_scheduler_type} needs the end of the run, and a log that "
            "grows has none: use constant or constant_with_warmup"
        )
    if step.negative_sampling == "all":
        raise UserError("--negative_sampling all needs a fixed catalogue, and this one grows: use uniform or shared")
    if training.save_strategy == "best" or training.init_from or training.max_steps > 0:
        raise UserError("--save_strategy best, --init_from and --max_steps are for train.py: leave them away")
    for name, is_set in _without_effect(settings):
        if is_set:
            raise UserError(
                f"--{name} has no effect on a walk, which ranks each period once and holds nothing out: leave it away"
            )
    settings.data_options = check_options(settings.data_options)
    options = {"split", "validation", "cutoff", "test_fraction", "k_core", "ranking", "id_mapping", "max_memory_gb"}
    unused = options & set(settings.data_options)
    if unused:
        raise UserError(f"data.{min(unused)} has no effect on a walk, which splits by --period and --walk_from")


def _without_effect(settings: Settings) -> list[tuple[str, bool]]:
    training = settings.training
    return [
        ("load_best_model_at_end", training.load_best_model_at_end),
        ("early_stopping_patience", training.early_stopping_patience is not None),
        ("early_stopping_threshold", training.early_stopping_threshold != 0),
        ("metric_for_best_model", training.metric_for_best_model is not None),
        ("calibrate_cost", settings.step.calibrate_cost),
        ("eval_strategy", training.eval_strategy != TrainingArguments.eval_strategy),
        ("eval_steps", training.eval_steps != TrainingArguments.eval_steps),
        ("eval_epochs", training.eval_epochs != TrainingArguments.eval_epochs),
    ]


def main(runtime: Runtime, argv: list[str]) -> None:
    """One walk over a log, from its name to an exported model."""
    settings = read_settings(argv, WalkArguments, PeriodTraining)
    _check(settings)
    for line in without_effect(settings):
        runtime.say(f"warning  {line}")
    with user_errors():
        log = read_log(settings.data.log_name, source_of(settings.data), **settings.data_options)
    periods = PeriodLog(log, settings.more[0])
    connect(runtime, use_cpu=settings.common.use_cpu, local_rank=settings.common.local_rank)
    walk = Walk(settings, runtime, periods, argv)
    runtime.say("\n".join(f"{name:<12} {value}" for name, value in walk.conditions.items()))
    runtime.say(f"{'periods':<12} {len(periods.names)} ({periods.names[0]} to {periods.names[-1]})")
    walk.run()
    walk.finish()


if __name__ == "__main__":
    run(main)
