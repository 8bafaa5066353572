"""The optimizer rules on gathered rows, in plain PyTorch: the definition that every backend must reproduce.

All tensors float32: rows p, grads g and wide slots [n, dim], narrow slots [n, 1]. t is the row's own step after this
update (int64 [n, 1]), or the hyperparameter `step` for all rows when step > 0 (one global clock). Everything is lazy:
rows without a gradient in a step see neither decay nor momentum. weight_decay = 0 and momentum = 0 switch them off.

    rule             slots (width)                          hyperparameters
    sgd              momentum_buffer (dim), if momentum>0   lr, momentum, weight_decay
    adagrad          sum (dim)                              lr, eps
    rowwise_adagrad  sum (1)                                lr, eps
    adam, adamw      exp_avg (dim), exp_avg_sq (dim)        lr, beta1, beta2, eps, weight_decay, step
"""

from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor

Slots = MutableMapping[str, Tensor]


def sgd(p: Tensor, g: Tensor, slots: Slots, t: Tensor, *, lr: float, momentum: float, weight_decay: float) -> None:
    """g += wd p; b = momentum b + g; p -= lr b (torch.optim.SGD without dampening)."""
    if weight_decay:
        g = g + weight_decay * p
    if momentum:
        g = slots["momentum_buffer"].mul_(momentum).add_(g)
    p.sub_(lr * g)


def adagrad(p: Tensor, g: Tensor, slots: Slots, t: Tensor, *, lr: float, eps: float) -> None:
    """G += g^2; p -= lr g / (sqrt(G) + eps)."""
    total = slots["sum"].add_(g * g)
    p.sub_(lr * g / (total.sqrt() + eps))


def rowwise_adagrad(p: Tensor, g: Tensor, slots: Slots, t: Tensor, *, lr: float, eps: float) -> None:
    """G += mean(g^2) over the row, in float64 so that its order does not show; p -= lr g / (sqrt(G) + eps)."""
    total = slots["sum"].add_(g.double().square().mean(dim=1, keepdim=True).float())
    p.sub_(lr * g / (total.sqrt() + eps))


def adam(
    p: Tensor, g: Tensor, slots: Slots, t: Tensor,
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: float,
) -> None:  # fmt: skip
    """g += wd p; m += (1-b1)(g-m); v = b2 v + (1-b2) g^2; p -= lr/(1-b1^t) m / (sqrt(v)/sqrt(1-b2^t) + eps)."""
    if weight_decay:
        g = g + weight_decay * p
    clock = torch.full_like(t, step, dtype=torch.float64) if step > 0 else t.double()
    step_size = (lr / (1 - beta1**clock)).float()  # [n, 1]
    root_correction = (1 - beta2**clock).sqrt().float()
    m = slots["exp_avg"].lerp_(g, 1 - beta1)
    v = slots["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * g * g)
    p.sub_(step_size * m / (v.sqrt() / root_correction + eps))


def adamw(p: Tensor, g: Tensor, slots: Slots, t: Tensor, *, lr: float, weight_decay: float, **hyper: float) -> None:
    """p *= 1 - lr wd (only when the row is touched), then Adam without decay."""
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    adam(p, g, slots, t, lr=lr, weight_decay=0.0, **hyper)


class Rule(NamedTuple):
    """What every backend must know of a rule."""

    apply: Callable[..., None]  # its definition
    slots: tuple[str, ...]
    hyper: frozenset[str]


_ADAM = frozenset({"lr", "beta1", "beta2", "eps", "weight_decay", "step"})
RULES = {  # in the order of their numbers in host/src/grzoo_host.h
    "sgd": Rule(sgd, ("momentum_buffer",), frozenset({"lr", "momentum", "weight_decay"})),
    "adagrad": Rule(adagrad, ("sum",), frozenset({"lr", "eps"})),
    "rowwise_adagrad": Rule(rowwise_adagrad, ("sum",), frozenset({"lr", "eps"})),
    "adam": Rule(adam, ("exp_avg", "exp_avg_sq"), _ADAM),
    "adamw": Rule(adamw, ("exp_avg", "exp_avg_sq"), _ADAM),
}


def check_hyper(rule: str, hyper: Collection[str]) -> None:
    """Raise ValueError for an unknown rule and TypeError for hyperparameters that are not those of the rule."""
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: use one of {tuple(RULES)}")
    if set(hyper) != RULES[rule].hyper:
        raise TypeError(f"{rule} takes exactly {sorted(RULES[rule].hyper)}, not {sorted(hyper)}")


def slots_of(rule: str, hyper: Mapping[str, float]) -> tuple[str, ...]:
    """Return the names of the slots that a rule reads and writes."""
    return () if rule == "sgd" and hyper["momentum"] == 0 else RULES[rule].slots
