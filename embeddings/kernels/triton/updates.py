"""Launches of the optimizer rules on rows in chunks."""

import math
from collections.abc import Callable, Mapping

import torch
from grzoo.embeddings.kernels.base import MAX_STEP, STEP_SLOT
from grzoo.embeddings.kernels.rules import check_hyper
from torch import Tensor

from . import update_kernels as kernels
from .chunks import Chunks
from .launch import WIDER, blocks, on

_LANES = 128 * WIDER


def apply(rule: str, rows: Chunks, slots: Mapping[str, Chunks], handles: Tensor, grads: Tensor, **hyper: float) -> None:
    """Apply one optimizer step (see TableStorage.update): two launches, nothing waits for the device.

    Raises ValueError for an unknown rule and TypeError for hyperparameters that are not those of the rule.
    """
    check_hyper(rule, hyper)
    if len(handles) == 0:
        return
    with on(rows.device):
        if rule in ("adam", "adamw"):
            _adam(rows, slots, handles, grads, decoupled=rule == "adamw", **hyper)
        else:
            _count(slots[STEP_SLOT], handles)
            _LAUNCH[rule](rows, slots, handles, grads, **hyper)


def _count(steps: Chunks, handles: Tensor, corrections: Tensor | None = None, *scalars: float) -> None:
    n = len(handles)
    scalars = scalars or (0.0,) * 6  # lr, step, logarithms of the betas
    args = steps.pointers, handles, handles if corrections is None else corrections, *scalars, n
    kinds = {"ADAM": corrections is not None, "GLOBAL": scalars[1] > 0}
    kernels.count_kernel[blocks(n, _LANES)](*args, **kinds, MAX=MAX_STEP, SHIFT=steps.shift, ROWS=_LANES)


def _sgd(
    rows: Chunks, slots: Mapping[str, Chunks], handles: Tensor, grads: Tensor,
    *, lr: float, momentum: float, weight_decay: float,
) -> None:  # fmt: skip
    n, shape = len(handles), rows.shape
    buffer = slots["momentum_buffer"].pointers if momentum else rows.pointers
    args = rows.pointers, buffer, handles, grads, lr, momentum, weight_decay, n
    grid = blocks(n, shape["ROWS"])
    kernels.sgd_kernel[grid](*args, MOMENTUM=momentum != 0, DECAY=weight_decay != 0, **shape)


def _adagrad(
    rows: Chunks, slots: Mapping[str, Chunks], handles: Tensor, grads: Tensor, *, lr: float, eps: float
) -> None:
    n, shape = len(handles), rows.shape
    args = rows.pointers, slots["sum"].pointers, handles, grads, lr, eps, n
    kernels.adagrad_kernel[blocks(n, shape["ROWS"])](*args, **shape)


def _rowwise_adagrad(
    rows: Chunks, slots: Mapping[str, Chunks], handles: Tensor, grads: Tensor, *, lr: float, eps: float
) -> None:
    n, shape = len(handles), rows.shape
    args = rows.pointers, slots["sum"].pointers, handles, grads, lr, eps, n
    kernels.rowwise_adagrad_kernel[blocks(n, shape["ROWS"])](*args, **shape)


def _adam(
    rows: Chunks, slots: Mapping[str, Chunks], handles: Tensor, grads: Tensor, *, decoupled: bool,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: float,
) -> None:  # fmt: skip
    n, shape = len(handles), rows.shape
    corrections = torch.empty(n, 2, dtype=torch.float32, device=rows.device)
    logarithms = (*_two_floats(_log(beta1)), *_two_floats(_log(beta2)))
    _count(slots[STEP_SLOT], handles, corrections, lr, float(step), *logarithms)
    kind, decay = (2, 1 - lr * weight_decay) if decoupled else (1, weight_decay)
    state = slots["exp_avg"].pointers, slots["exp_avg_sq"].pointers
    args = rows.pointers, *state, handles, grads, corrections, 1 - beta1, beta2, 1 - beta2, eps, decay, n
    kernels.adam_kernel[blocks(n, shape["ROWS"])](*args, DECAY=kind if weight_decay else 0, **shape)


_LAUNCH: dict[str, Callable[..., None]] = {"sgd": _sgd, "adagrad": _adagrad, "rowwise_adagrad": _rowwise_adagrad}


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e30  # 0^t = 0


def _two_floats(value: float) -> tuple[float, float]:
    """Split a float64 into two float32 that add up to it: kernels take float32."""
    high = torch.tensor(value, dtype=torch.float32, device="cpu").item()
    return high, value - high
