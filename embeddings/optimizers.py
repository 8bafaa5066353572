"""Sparse optimizers: the torch Optimizer interface over the rows of a DynamicEmbeddingCollection.

Gradients gather in the leaves of fetched steps; `reduce` sums them by id on the owner of each row, `step` updates rows
in place. A row is touched by a step when its id was looked up in it and a gradient reached its table. Updates are lazy:
rows that are not touched see no decay and no momentum. The formulas are in `kernels/rules.py`.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels import Slot
from .reduction import RowGradients, agree_on_touched, reduce_gradients, squared_norm
from .step import Step
from .table import PhysicalTable
from .use import record_use

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection

STEP_MODES = ("row", "global")

LearningRate = float | Mapping[str, float]


class SparseOptimizer(torch.optim.Optimizer):
    """Base class; use one of its subclasses.

    Has one param group per logical table, with "name", "lr" and the rule's hyperparameters: learning-rate schedulers of
    torch work, and a group's values may be changed. The params of a group are an empty anchor.

    Args:
        collection: the tables; one optimizer at a time is attached to them.
        lr: learning rate, or a mapping from table name to learning rate.
        defaults: hyperparameters of the rule.
        max_grad_norm: clip the norm over all tables and ranks to this; 0 switches it off.
    """

    rule = ""

    def __init__(
        self,
        collection: "DynamicEmbeddingCollection",
        lr: LearningRate,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float = 0.0,
    ) -> None:
        rates = _rates(collection, lr)
        _check_range("max_grad_norm", max_grad_norm)
        groups = [
            {"params": [torch.nn.Parameter(torch.empty(0, device="cpu"))], "name": name, "lr": rates[name], "steps": 0}
            for name in collection.table_names
        ]
        super().__init__(groups[:1], {"lr": 0.0, **defaults})
        # As add_param_group, which would compare the params of each group with those of all before it.
        self.param_groups += [self.defaults | group for group in groups[1:]]
        self.collection = collection
        self.max_grad_norm = max_grad_norm
        self.grad_norm = 0.0
        self._pending: list[Step] = []  # fetched for training and not yet applied, in the order of preparation
        self._survived: set[int] = set()  # serials of pending steps that outlived a step() or zero_grad() untouched
        self._reduced: list[RowGradients] | None = None
        self._reached: set[str] = set()  # tables with a gradient in what was reduced, on some rank
        self._notes: set[int | None] = set()  # when the use of the rows in it was noted
        self._finite = True
        collection.attach(self, self.layout)

    def layout(self, dim: int) -> list[Slot]:
        """Return the optimizer state of a row of width `dim`."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        """Return the hyperparameters of the rule for one param group."""
        raise NotImplementedError

    # ------------------------------------------------------------------ gradients

    def track(self, step: Step) -> None:
        """Called by a step when it is fetched for training and when a gradient arrives."""
        if self._reduced is not None:
            raise RuntimeError("backward or fetch between reduce() and step(): call step() or zero_grad() first")
        if step not in self._pending:
            self._pending.append(step)
            self._pending.sort(key=lambda s: s.serial)

    @torch.no_grad()
    def reduce(self, *, scale: float = 1.0) -> bool:
        """Sum the gradients of all pending steps by id on the owner of each row. Collective.

        The result is scale * sum over ranks / world size: the mean over ranks, as DDP and DeepSpeed give it. Sets
        `grad_norm`, its norm over all tables and ranks.

        Returns:
            Whether all gradients on all ranks are finite. When not, `step` will leave the tables as they are.

        Raises RuntimeError when called again before `step` or `zero_grad`, or when ranks disagree on the pending steps.
        """
        if self._reduced is not None:
            raise RuntimeError("reduce() was called already: call step() or zero_grad() first")
        exchange = self.collection.exchange
        touched = agree_on_touched(self.collection, self._pending)
        if not touched:
            self.grad_norm, self._finite = 0.0, True
            return True
        self._reduced = reduce_gradients(self.collection, self._pending, touched, scale / exchange.world_size)
        self._reached = set().union(*touched.values())
        self._notes = {step.noted for step in self._pending if step.serial in touched}
        self._forget(set(touched))
        self.grad_norm = math.sqrt(exchange.sum_float(squared_norm(self.collection, self._reduced)))
        self._finite = math.isfinite(self.grad_norm)
        return self._finite

    def _forget(self, serials: set[int]) -> None:
        """Drop the given steps, and those that were here at the last call and were not touched since."""
        for step in self._pending:
            if step.serial in serials:
                step.drop_gradients()
        self._pending = [s for s in self._pending if s.serial not in serials | self._survived]
        self._survived = {s.serial for s in self._pending}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of pending steps and what `reduce` made of them. Not collective.

        A step that was fetched and not touched yet may still be differentiated, as in torch.
        """
        self._reduced, self._finite = None, True
        self._forget({step.serial for step in self._pending if step.touched})

    @property
    def pending(self) -> tuple[Step, ...]:
        """Steps that were fetched for training and not yet applied or dropped."""
        return tuple(self._pending)

    def forget_rows(self, table: PhysicalTable, handles: Tensor) -> None:
        """Drop what `reduce` found for rows that are gone: handles int64 [n]."""
        for physical, rows in zip(self.collection.physical, self._reduced or (), strict=False):
            if physical is table:
                keep = ~torch.isin(rows.handles, handles)
                rows.tables, rows.handles, rows.grads = rows.tables[keep], rows.handles[keep], rows.grads[keep]
                rows.keys = None if rows.keys is None else rows.keys[keep]

    def discard(self) -> None:
        """Forget all pending steps, because their rows are gone."""
        self._pending, self._survived = [], set()
        self._reduced, self._finite = None, True

    # ------------------------------------------------------------------ update

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Reduce (unless `reduce` was called), clip, update the touched rows, drop the gradients, evict. Collective.

        Without gradients on any rank nothing happens. If gradients are not finite the tables stay as they are and,
        unless the caller learnt it from `reduce`, FloatingPointError is raised on every rank.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        was_consulted = self._reduced is not None
        if not was_consulted:
            self.reduce()
        reduced, finite = self._reduced, self._finite
        self._reduced, self._finite = None, True
        if not finite and not was_consulted:
            raise FloatingPointError(f"gradients of the embedding tables are not finite (norm {self.grad_norm})")
        if reduced is not None and finite:
            self._apply(reduced)
            if self._notes != {self.collection.clock + 1}:
                note_use(self.collection, reduced)
            self.collection.end_step()
        return loss

    def _apply(self, reduced: list[RowGradients]) -> None:
        coefficient = 1.0
        if self.max_grad_norm:
            coefficient = min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6))
        groups = {group["name"]: group for group in self.param_groups}
        for name in self._reached:
            groups[name]["steps"] += 1
        for table, row_gradients in zip(self.collection.physical, reduced, strict=True):
            by_hyper: dict[tuple[tuple[str, float], ...], list[int]] = {}
            for position, config in enumerate(table.configs):
                by_hyper.setdefault(tuple(self.hyper(groups[config.name]).items()), []).append(position)
            targets = [(table.storage, row_gradients)]
            if table.shared is not None and row_gradients.shared is not None:
                targets.append((table.shared.storage, row_gradients.shared))
            for storage, gradients in targets:
                if coefficient != 1.0:
                    gradients.grads.mul_(coefficient)
                for hyper, positions in by_hyper.items():
                    mine = _of_tables(gradients, positions, all_tables=len(by_hyper) == 1)
                    if len(mine.handles):
                        storage.update(self.rule, mine.handles, mine.grads, mine.keys, **dict(hyper))


def note_use(collection: "DynamicEmbeddingCollection", reduced: list[RowGradients]) -> None:
    """Note that the step which ends used the rows it updated, where their last use is kept; their counts stay.

    For steps that were prepared before another one was applied, or without counting: `prepare` noted an older step.
    """
    for table, rows in zip(collection.physical, reduced, strict=True):
        if table.use_slots and len(rows.handles):
            half_lives = None if table.half_lives is None else table.half_lives[rows.tables.long()]
            record_use(table.storage, rows.handles, torch.zeros_like(rows.handles), collection.clock + 1, half_lives)


def _of_tables(rows: RowGradients, positions: list[int], *, all_tables: bool) -> RowGradients:
    if all_tables:
        return rows
    mine = torch.isin(rows.tables, torch.tensor(positions, dtype=torch.int32, device=rows.tables.device))
    keys = None if rows.keys is None else rows.keys[mine]
    return RowGradients(rows.tables[mine], rows.handles[mine], rows.grads[mine], keys)


def _rates(collection: "DynamicEmbeddingCollection", lr: LearningRate) -> dict[str, float]:
    rates = dict(lr) if isinstance(lr, Mapping) else dict.fromkeys(collection.table_names, lr)
    if set(rates) != set(collection.table_names):
        raise ValueError(f"lr must name each of the tables {collection.table_names}, got {sorted(rates)}")
    for name, rate in rates.items():
        _check_range(f"lr of table {name!r}", rate)
    return rates


def _check_range(name: str, value: float, end: float = math.inf) -> None:
    if not 0.0 <= value < end:
        raise ValueError(f"{name} must be at least 0 and less than {end}, got {value}")


class SparseSGD(SparseOptimizer):
    """Lazy SGD with momentum: torch.optim.SGD on the touched rows."""

    rule = "sgd"

    def __init__(
        self,
        collection: "DynamicEmbeddingCollection",
        lr: LearningRate,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float = 0.0,
    ) -> None:
        _check_range("momentum", momentum, 1.0)
        _check_range("weight_decay", weight_decay)
        self._momentum = momentum
        super().__init__(collection, lr, {"weight_decay": weight_decay}, max_grad_norm=max_grad_norm)

    def layout(self, dim: int) -> list[Slot]:
        return [Slot("momentum_buffer", dim)] if self._momentum else []

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"lr": group["lr"], "momentum": self._momentum, "weight_decay": group["weight_decay"]}


class SparseAdagrad(SparseOptimizer):
    """Adagrad: torch.optim.Adagrad on the touched rows."""

    rule = "adagrad"

    def __init__(
        self,
        collection: "DynamicEmbeddingCollection",
        lr: LearningRate,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        *,
        max_grad_norm: float = 0.0,
    ) -> None:
        _check_range("eps", eps)
        _check_range("initial_accumulator_value", initial_accumulator_value)
        self._fill = initial_accumulator_value
        super().__init__(collection, lr, {"eps": eps}, max_grad_norm=max_grad_norm)

    def layout(self, dim: int) -> list[Slot]:
        return [Slot("sum", dim, self._fill)]

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"lr": group["lr"], "eps": group["eps"]}


class SparseRowwiseAdagrad(SparseAdagrad):
    """Adagrad with one accumulator per row, G += mean(g^2): four bytes of state whatever the width."""

    rule = "rowwise_adagrad"

    def __init__(
        self,
        collection: "DynamicEmbeddingCollection",
        lr: LearningRate,
        eps: float = 1e-8,
        initial_accumulator_value: float = 0.0,
        *,
        max_grad_norm: float = 0.0,
    ) -> None:
        super().__init__(collection, lr, eps, initial_accumulator_value, max_grad_norm=max_grad_norm)

    def layout(self, dim: int) -> list[Slot]:
        return [Slot("sum", 1, self._fill)]


class SparseAdam(SparseOptimizer):
    """Lazy Adam: torch.optim.Adam on the touched rows; `weight_decay` is added to the gradient.

    Args:
        step_mode: the clock of the bias correction. "row": the updates of the row itself, right for rare ids.
            "global": those of its table, as torch.optim.SparseAdam; a rare row then gets almost no correction.
    """

    rule = "adam"

    def __init__(
        self,
        collection: "DynamicEmbeddingCollection",
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float = 0.0,
        step_mode: str = "row",
    ) -> None:
        _check_range("betas[0]", betas[0], 1.0)
        _check_range("betas[1]", betas[1], 1.0)
        _check_range("eps", eps)
        _check_range("weight_decay", weight_decay)
        if step_mode not in STEP_MODES:
            raise ValueError(f"step_mode must be one of {STEP_MODES}, got {step_mode!r}")
        self.step_mode = step_mode
        defaults = {"betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(collection, lr, defaults, max_grad_norm=max_grad_norm)

    def layout(self, dim: int) -> list[Slot]:
        return [Slot("exp_avg", dim), Slot("exp_avg_sq", dim)]

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        clock = float(group["steps"]) if self.step_mode == "global" else 0.0
        names = ("lr", "eps", "weight_decay")
        return {name: group[name] for name in names} | {"beta1": beta1, "beta2": beta2, "step": clock}


class SparseAdamW(SparseAdam):
    """Lazy AdamW: torch.optim.AdamW on the touched rows. Decay is lazy too: a row decays in the steps that touch it."""

    rule = "adamw"

    def __init__(
        self,
        collection: "DynamicEmbeddingCollection",
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        max_grad_norm: float = 0.0,
        step_mode: str = "row",
    ) -> None:
        super().__init__(collection, lr, betas, eps, weight_decay, max_grad_norm=max_grad_norm, step_mode=step_mode)
