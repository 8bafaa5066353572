"""One engine of two sides: DeepSpeed trains the dense parameters, a sparse optimizer the rows of the tables."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from grzoo.embeddings.collection import DynamicEmbeddingCollection
from grzoo.embeddings.exchange import Exchange
from grzoo.embeddings.optimizers import SparseOptimizer
from grzoo.embeddings.step import Step
from torch import Tensor, nn

from .config import EngineConfig
from .overflow import poison_dense_gradients
from .phases import PhaseClock

logger = logging.getLogger(__name__)


class GlobalStepLike(Protocol):
    """What the engine knows of a step: this rank's micro-batches and the loss denominator of all ranks."""

    @property
    def micro_batches(self) -> Sequence[Mapping[str, Any]]: ...

    @property
    def num_items_in_batch(self) -> int | Sequence[int]: ...


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What one optimizer step did; equal on all ranks but for `seconds` and `statistics`.

    Attributes:
        loss: mean loss over the trained items of the global batch, before the update.
        applied: False when a gradient of either side was not finite, so that neither was updated.
        grad_norm: norm of the dense gradient before clipping; infinite when the step was not applied.
        sparse_grad_norm: norm of the gradient of all touched rows before clipping.
        learning_rate: dense learning rate that the step used.
        seconds: time per phase: prepare, fetch, forward, backward, reduce, dense_step, sparse_step.
        statistics: of this rank's lookup: ids, unique_sent, unique_owned, inserted, bytes_sent.
    """

    loss: float
    applied: bool
    grad_norm: float
    sparse_grad_norm: float
    learning_rate: float
    seconds: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, int] = field(default_factory=dict)


class GenRecEngine:
    """Composes a DeepSpeedEngine (`.deepspeed`) with a sparse optimizer; made by `initialize`.

    The recommended loop is `engine.train_batch(global_step)`. DeepSpeed's own loop works too: `loss =
    engine(**batch).loss; engine.backward(loss); engine.step()`, each forward being a lookup of its own (all ranks call
    equally often).
    """

    def __init__(
        self,
        *,
        deepspeed: Any,
        config: EngineConfig,
        collection: DynamicEmbeddingCollection,
        sparse_optimizer: SparseOptimizer,
        sparse_lr_scheduler: Any | None,
    ) -> None:
        self.deepspeed = deepspeed
        self.config = config
        self.collection = collection
        self.sparse_optimizer = sparse_optimizer
        self.sparse_lr_scheduler = sparse_lr_scheduler

    @property
    def exchange(self) -> Exchange:
        """The ranks that share the tables."""
        return self.collection.exchange

    # DeepSpeed's interface

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.deepspeed.module

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device(self.deepspeed.device)

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's wrapper of the dense optimizer."""
        return self.deepspeed.optimizer

    @property
    def lr_scheduler(self) -> Any:
        """The dense scheduler; advances on applied steps only."""
        return self.deepspeed.lr_scheduler

    @property
    def global_steps(self) -> int:
        """Steps taken, the skipped ones included."""
        return int(self.deepspeed.global_steps)

    @property
    def skipped_steps(self) -> int:
        """Steps that were not applied."""
        return int(self.deepspeed.skipped_steps)

    @property
    def training(self) -> bool:
        return bool(self.deepspeed.training)

    def train(self, mode: bool = True) -> "GenRecEngine":
        """Puts the model, its tables included, into training mode."""
        self.deepspeed.train(mode)
        return self

    def eval(self) -> "GenRecEngine":
        """Puts the model into evaluation mode: lookups no longer insert."""
        return self.train(False)

    def get_lr(self) -> list[float]:
        """Learning rate of each dense parameter group."""
        return [float(rate) for rate in self.deepspeed.get_lr()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; without `embeddings=` the model looks its ids up itself, which is collective."""
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients on both sides; those of the ranks are averaged, as in DeepSpeed."""
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Says before forward whether the next backward is the last of its step (until then: every one is)."""
        self.deepspeed.set_gradient_accumulation_boundary(is_boundary)

    def was_step_applied(self) -> bool:
        """Whether the last `step()` updated both sides (True) or neither (False)."""
        return bool(self.deepspeed.was_step_applied())

    def step(self) -> None:
        """Updates both sides, or neither when a gradient of either is not finite. Collective."""
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()
            return
        sparse_is_finite = self.sparse_optimizer.reduce()
        self._apply(sparse_is_finite, PhaseClock(self.device))

    def destroy(self) -> None:
        """Removes DeepSpeed's hooks from the model; model and tables stay usable."""
        self.deepspeed.destroy()

    # The step as one call

    def train_batch(self, global_step: GlobalStepLike) -> StepOutput:
        """Runs one optimizer step on this rank's micro-batches. Collective: all ranks have equally many.

        The gradient is that of the sum of all losses of all ranks divided by `num_items_in_batch`; the number of ranks
        and micro-batches changes it by rounding only. Calls `model(**micro_batch, embeddings=...,
        num_items_in_batch=...)`, which must return an object with `.loss`, and `model.embedding_ids(micro_batch)`.

        Raises:
            ValueError: on all ranks, when the ids of one rank are not usable or ranks disagree on the step.
        """
        self.train()
        clock = PhaseClock(self.device)
        with clock.phase("prepare"):
            micro_batches, step = self._prepare(global_step, train=True)
        with clock.phase("fetch"):
            step.fetch(self.device)
        denominator = global_step.num_items_in_batch
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for k, micro_batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(k == len(micro_batches) - 1)
            with clock.phase("forward"):
                output = self.deepspeed(**micro_batch, embeddings=step[k], num_items_in_batch=denominator)
            with clock.phase("backward"):
                self.backward(output.loss * self.exchange.world_size)  # DeepSpeed averages over the ranks
                loss_sum += output.loss.detach()
        with clock.phase("reduce"):
            sparse_is_finite = self.sparse_optimizer.reduce()
        sparse_norm = float(self.sparse_optimizer.grad_norm)
        learning_rate = self.get_lr()[0]
        self._apply(sparse_is_finite, clock)
        return StepOutput(
            loss=self.exchange.sum_float(float(loss_sum)),
            applied=self.was_step_applied(),
            grad_norm=float(self.deepspeed.get_global_grad_norm()),
            sparse_grad_norm=sparse_norm,
            learning_rate=learning_rate,
            seconds=clock.seconds(),
            statistics=dict(step.statistics),
        )

    @torch.no_grad()
    def eval_batch(self, global_step: GlobalStepLike) -> float:
        """Mean loss over the global batch, in evaluation mode and without touching the tables. Collective."""
        with self._evaluating():
            micro_batches, step = self._prepare(global_step, train=False)
            step.fetch(self.device)
            total = 0.0
            for k, micro_batch in enumerate(micro_batches):
                denominator = global_step.num_items_in_batch
                output = self.deepspeed(**micro_batch, embeddings=step[k], num_items_in_batch=denominator)
                total += float(output.loss)
        return self.exchange.sum_float(total)

    def _prepare(self, global_step: GlobalStepLike, *, train: bool) -> tuple[list[dict[str, Any]], Step]:
        micro_batches: list[dict[str, Any]] = []
        ids: list[Mapping[str, Tensor]] = []
        error: Exception | None = None
        try:
            micro_batches = [self._to_device(micro_batch) for micro_batch in global_step.micro_batches]
            # Ids of tables in host memory are collected there, where nobody waits for a GPU.
            asked = global_step.micro_batches if self._tables_are_on_host else micro_batches
            ids = [self.module.embedding_ids(micro_batch) for micro_batch in asked]  # type: ignore[operator]
            if not micro_batches:
                raise ValueError("the step has no micro-batches: a rank without data needs an empty one")
            if min(_counts(global_step)) < 1:
                raise ValueError(f"num_items_in_batch is {global_step.num_items_in_batch}: nothing to train on")
        except Exception as exception:
            error = exception
        self.exchange.agree(error)
        self._check_same_step(len(micro_batches), _counts(global_step))
        return micro_batches, self.collection.prepare(ids, insert=train)

    @property
    def _tables_are_on_host(self) -> bool:
        return all(config.placement == "host" for config in self.collection.tables.values())

    def _check_same_step(self, num_micro_batches: int, num_items: list[int]) -> None:
        """ZeRO's collectives inside a micro-batch would hang if ranks had different numbers of them."""
        everyone = self.exchange.gather_ints([num_micro_batches, *num_items])
        if any(rank != everyone[0] for rank in everyone):
            raise ValueError(
                f"ranks disagree on the step, (micro-batches, num_items_in_batch) by rank: {everyone}; every rank must "
                "bring its part of one global step (add empty micro-batches where a rank has fewer)"
            )

    def _to_device(self, micro_batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in micro_batch.items()
        }

    def _apply(self, sparse_is_finite: bool, clock: PhaseClock) -> None:
        """The dense step, then the sparse one if DeepSpeed applied its own."""
        with clock.phase("dense_step"):
            if not sparse_is_finite:
                poison_dense_gradients(self.deepspeed)
            self.deepspeed.step()
        if not self.was_step_applied():
            self.sparse_optimizer.zero_grad()
            logger.warning("step %d was not applied: a gradient was not finite", self.global_steps)
            return
        if not sparse_is_finite:
            raise RuntimeError("DeepSpeed applied a step whose gradient was made NaN: please report its version")
        with clock.phase("sparse_step"):
            self.sparse_optimizer.step()
            if self.sparse_lr_scheduler is not None:
                self.sparse_lr_scheduler.step()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    # Checkpoints

    def save_checkpoint(
        self, save_dir: str | Path, tag: str | None = None, client_state: Mapping[str, Any] | None = None
    ) -> Path:
        """Writes `save_dir/tag` (default `checkpoint-<global_steps>`), complete or not at all. Collective.

        Args:
            save_dir: a folder that all ranks see.
            tag: name of the checkpoint's folder.
            client_state: JSON values to get back from `load_checkpoint`, such as the position in the data.

        Raises:
            ValueError: client_state is not JSON. OSError: the disk is full or not writable; nothing is left behind.
        """
        from .checkpoint import save_checkpoint

        return save_checkpoint(self, Path(save_dir), tag or f"checkpoint-{self.global_steps}", client_state or {})

    def load_checkpoint(self, load_dir: str | Path, tag: str | None = None) -> tuple[Path, dict[str, Any]]:
        """Continues from a checkpoint written by any number of ranks at any ZeRO stage. Collective.

        Args:
            load_dir: the folder given to `save_checkpoint`, or one checkpoint.
            tag: name of one checkpoint; default: the newest complete one in `load_dir`.

        Returns: the checkpoint's folder and its client_state.

        Raises:
            ValueError: no complete checkpoint there, a damaged one, or one of another model or optimizer.
        """
        from .checkpoint import load_checkpoint

        return load_checkpoint(self, Path(load_dir), tag)


def _counts(global_step: GlobalStepLike) -> list[int]:
    """The loss denominators of a step, one per task."""
    items = global_step.num_items_in_batch
    return [items] if isinstance(items, int) else list(items)
