"""The training loop: steps until the end, metrics, evaluations and checkpoints when they are due."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grzoo.data import GlobalStep, StepLoader
from grzoo.embeddings.engine import GenRecEngine, StepOutput
from grzoo.embeddings.engine.folder import candidates
from grzoo.embeddings.engine.rotation import rotate
from tqdm import tqdm

from .arguments import TrainingArguments
from .best_model import BestModel
from .metrics_log import MetricsLog
from .preemption import Preemption
from .runtime import Preempted, Runtime, UserError, user_errors

_SHOWN = ("ndcg@10", "hr@10", "hr@50", "mrr", "auc", "gauc", "logloss", "ne")


@dataclass
class Meter:
    """Sums over the steps since the last line of metrics."""

    began: float = field(default_factory=time.perf_counter)
    steps: int = 0
    skipped: int = 0
    loss: float = 0.0
    tokens: int = 0
    users: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, step: GlobalStep, output: StepOutput, data_seconds: float) -> None:
        self.steps += 1
        self.skipped += not output.applied
        self.loss += output.loss
        self.tokens += step.num_tokens
        self.users += step.num_users
        for phase, seconds in {"data": data_seconds, **output.seconds}.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def line(self, output: StepOutput) -> dict[str, float]:
        """One line of metrics.jsonl: means per step, throughput of all ranks over the wall time."""
        elapsed = time.perf_counter() - self.began
        return {
            "train/loss": self.loss / self.steps,
            "train/learning_rate": output.learning_rate,
            "train/grad_norm": output.grad_norm,
            "train/sparse_grad_norm": output.sparse_grad_norm,
            "train/skipped_steps": self.skipped,
            "train/tokens_per_second": self.tokens / elapsed,
            "train/users_per_second": self.users / elapsed,
            **{f"train/seconds_{phase}": seconds / self.steps for phase, seconds in self.seconds.items()},
            **{f"train/{name}": value for name, value in output.statistics.items()},
        }


class TrainingLoop:
    """Runs `engine` over `loader` from the loader's position.

    Args:
        evaluate: makes the metrics of one evaluation (collective); called when due by `arguments.eval_strategy`.
        total_steps: optimizer steps of the whole run, those before a resume included.
        identity: JSON values that every checkpoint carries, to make the model of it again.
        best: follows the evaluations, if the best is to be kept or training to stop early.
    """

    def __init__(
        self,
        engine: GenRecEngine,
        loader: StepLoader,
        arguments: TrainingArguments,
        log: MetricsLog,
        runtime: Runtime,
        *,
        total_steps: int,
        evaluate: Callable[[], dict[str, float]],
        identity: dict[str, Any],
        best: BestModel | None = None,
    ) -> None:
        self.engine, self.loader, self.arguments, self.log, self.runtime = engine, loader, arguments, log, runtime
        self.total_steps, self.evaluate, self.identity, self.best = total_steps, evaluate, identity, best
        self.step = 0
        self.saved_step: int | None = None
        self.preemption = Preemption(engine.exchange)
        self.last_evaluation: tuple[int, dict[str, float]] | None = None

    def resume(self, folder: Path, check: Callable[[dict[str, Any], str], None] = lambda state, path: None) -> Path:
        """Continues from a checkpoint, or the newest complete one in `folder`, of any number of ranks; says which.

        check: raises where the state of that checkpoint, at that path, is not one to go on from.
        """
        path, state = self.engine.load_checkpoint(folder)
        check(state, str(path))
        if "loader" not in state:
            raise UserError(f"{path} was not written by this recipe: it holds no position in the data")
        self.loader.load_state_dict(state["loader"])
        self.step = self.saved_step = int(state["step"])
        if self.best is not None:
            self.best.load_state_dict(state.get("best") or {}, path, self.step)
        return path

    def run(self) -> None:
        """Trains until `total_steps`, and saves.

        Raises:
            Preempted: on all ranks, when one was told to end (SIGTERM); the step in progress was finished and saved.
            UserError: on all ranks, when a checkpoint could not be written.
        """
        # tqdm's None: hidden where there is no terminal.
        hide = True if not self.runtime.is_main or self.arguments.disable_tqdm else None
        with self.preemption, tqdm(total=self.total_steps, initial=self.step, unit="step", disable=hide) as bar:
            while not self._is_done():
                self._run_epoch(bar)
            # Where no evaluation was the best, or its checkpoint is lost, the last model is better than none.
            if self.arguments.save_strategy != "best" or (self.best is not None and self.best.checkpoint is None):
                self._save_last()
            if self.best is not None and self.step < self.total_steps and self.runtime.is_main:
                bar.write(f"stopped early: {self.best.waited} evaluations without a better one than {self.best}")

    def load_best(self) -> None:
        """Puts the weights and rows of the best evaluation into the engine, when they were to be kept. Collective.

        Raises:
            UserError: on all ranks, when no evaluation was the best, or its checkpoint is missing or damaged.
        """
        if self.best is None or not self.best.keeps or self.best.step == self.step:
            return
        if self.best.checkpoint is None:
            why = (
                "no evaluation had a finite value" if self.best.step is None else "its checkpoint is missing or damaged"
            )
            raise UserError(f"there is no best {self.best.metric} to load: {why}; {self._export_the_last()}")
        try:
            with user_errors():
                self.engine.load_checkpoint(self.best.checkpoint)
        except UserError as error:
            raise UserError(f"{error}; {self._export_the_last()}") from error

    def _export_the_last(self) -> str:
        return f"recipes/export.py exports checkpoint-{self.saved_step}"

    def _is_done(self) -> bool:
        return self.step >= self.total_steps or (self.best is not None and self.best.is_out_of_patience)

    def _run_epoch(self, bar: Any) -> None:
        meter, waiting = Meter(), time.perf_counter()
        for global_step in self.loader:
            data_seconds = time.perf_counter() - waiting
            output = self.engine.train_batch(global_step)
            self.step += 1
            meter.add(global_step, output, data_seconds)
            bar.update()
            ends_epoch = global_step.end[1] == 0
            if self.step % self.arguments.logging_steps == 0 or self.step == self.total_steps:
                self._log(bar, meter, output)
                meter = Meter()
            is_best = False
            if self._evaluates(ends_epoch, global_step.epoch):
                meter.began += self._evaluate(bar)
                is_best = self._is_best()
            if is_best or self._saves(ends_epoch):
                meter.began += self._save()
            if self.preemption.is_due():
                self._leave()
            if self._is_done():
                return
            waiting = time.perf_counter()

    @property
    def epoch(self) -> float:
        """Passes over the training users so far."""
        state = self.loader.state_dict()
        return float(state["epoch"] + state["cursor"] / self.loader.sampler.rows_per_epoch)

    def _log(self, bar: Any, meter: Meter, output: StepOutput) -> None:
        line = meter.line(output)
        self.log.write(self.step, self.epoch, line)
        loss, speed = line["train/loss"], line["train/tokens_per_second"]
        bar.set_postfix(loss=f"{loss:.4f}", tokens_per_second=f"{speed:,.0f}", refresh=False)
        if self.runtime.is_main:
            place = f"step {self.step}/{self.total_steps}  epoch {self.epoch:.2f}"
            bar.write(f"{place}  loss {loss:.4f}  {speed:,.0f} tokens/s")

    def _evaluates(self, ends_epoch: bool, epoch: int) -> bool:
        strategy = self.arguments.eval_strategy
        if self.step == self.total_steps:
            return strategy != "no"
        if strategy == "epoch":
            return ends_epoch and (epoch + 1) % self.arguments.eval_epochs == 0
        return strategy == "steps" and self.step % self.arguments.eval_steps == 0

    def _saves(self, ends_epoch: bool) -> bool:
        strategy = self.arguments.save_strategy
        return (ends_epoch and strategy == "epoch") or (
            strategy == "steps" and self.step % self.arguments.save_steps == 0
        )

    def _evaluate(self, bar: Any) -> float:
        began = time.perf_counter()
        self.log.write(self.step, self.epoch, self._table_metrics())
        metrics = self.evaluate()
        unknown = {f"unknown_rate/{t}": s["unknown_rate"] for t, s in self.engine.collection.statistics().items()}
        seconds = time.perf_counter() - began
        self.last_evaluation = (self.step, metrics)
        line = {f"eval/{name}": value for name, value in (metrics | unknown | {"seconds": seconds}).items()}
        self.log.write(self.step, self.epoch, line)
        if self.runtime.is_main:
            shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items() if k in _SHOWN)
            bar.write(f"evaluation after {self.step} steps: {shown}  ({seconds:.1f} s)")
        return seconds

    def _is_best(self) -> bool:
        """Whether the evaluation just made has to be saved, as the best one."""
        if self.best is None:
            return False
        assert self.last_evaluation is not None
        return self.best.update(self.step, self.epoch, self.last_evaluation[1]) and self.best.keeps

    def _table_metrics(self) -> dict[str, float]:
        """Numbers of each table since the last evaluation. Collective."""
        return {
            f"tables/{table}/{name}": value
            for table, statistics in self.engine.collection.statistics().items()
            for name, value in statistics.items()
            if isinstance(value, int | float)
        }

    def _save(self) -> float:
        began = time.perf_counter()
        assert self.arguments.output_dir is not None
        folder = Path(self.arguments.output_dir)
        state = {**self.identity, "loader": self.loader.state_dict(), "step": self.step}
        if self.best is not None:
            state["best"] = self.best.state_dict()
        try:
            path = self.engine.save_checkpoint(folder, tag=f"checkpoint-{self.step}", client_state=state)
        except OSError as error:
            raise UserError(f"cannot write checkpoint-{self.step}: {error}; {self._what_is_left(folder)}") from error
        self.saved_step = self.step
        if self.best is not None and self.best.step == self.step:
            self.best.checkpoint = path
        if self.runtime.is_main:
            rotate(path, self.arguments.save_total_limit, keep=self.best.checkpoint if self.best else None)
        return time.perf_counter() - began

    def _what_is_left(self, folder: Path) -> str:
        if self.saved_step is None:
            return f"{folder} holds no checkpoint of this run: make room and start again"
        return f"checkpoint-{self.saved_step} is intact: make room and continue with --resume_from_checkpoint last"

    def _save_last(self) -> None:
        if self.arguments.save_strategy != "no" and self.saved_step != self.step:
            self._save()

    def _leave(self) -> None:
        self._save_last()
        if self.arguments.save_strategy == "no":
            raise Preempted(f"told to end after step {self.step}; nothing was saved, as save_strategy=no asks")
        raise Preempted(f"told to end: saved checkpoint-{self.step}; continue with --resume_from_checkpoint last")


def total_steps(arguments: TrainingArguments, steps_per_epoch: int) -> int:
    """Optimizer steps of the run: `max_steps` when positive, else `num_train_epochs` rounded up to a step."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    # Rounded first: 1.1 epochs of 10 steps are 11.000000000000002 in floating point.
    return math.ceil(round(arguments.num_train_epochs * steps_per_epoch, 6))


def checkpoint_to_resume(arguments: TrainingArguments) -> Path | None:
    """The folder that `--resume_from_checkpoint` means; None for 'last' when output_dir has no checkpoint yet.

    For 'last' that is output_dir itself: the engine takes the newest checkpoint that is not damaged.
    """
    wanted = arguments.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted in ("last", "true", "True"):
        output_dir = Path(arguments.output_dir or "")
        return output_dir if candidates(output_dir) else None
    path = Path(wanted)
    if not path.is_dir():
        raise UserError(f"no checkpoint folder {wanted!r} for --resume_from_checkpoint; 'last' takes the newest")
    return path
