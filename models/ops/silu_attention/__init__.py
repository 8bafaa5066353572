"""Silu attention over packed samples under a visibility mask: what the ranking models attend with."""

import logging
from collections.abc import Callable

from grzoo.models.packing import JaggedLayout
from torch import Tensor

from .eager import silu_attention_eager
from .naive import silu_attention_naive
from .visibility import ALWAYS, NEVER, STATIC, Visibility

logger = logging.getLogger(__name__)
_said: set[str] = set()


def silu_attention_auto(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    visibility: Visibility,
    *,
    divisors: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """`silu_attention_naive` (formula and shapes there) by the fastest path: the eager one, said once."""
    if "eager" not in _said:
        _said.add("eager")
        logger.info("silu attention runs as grouped tensor operations (eager): this mask has no C++ or Triton kernel")
    return silu_attention_eager(query, key, value, layout, visibility, divisors=divisors, scale=scale)


SILU_ATTENTION_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "auto": silu_attention_auto,
    "eager": silu_attention_eager,
    "naive": silu_attention_naive,
}

__all__ = [
    "ALWAYS",
    "NEVER",
    "SILU_ATTENTION_FUNCTIONS",
    "STATIC",
    "Visibility",
    "silu_attention_auto",
    "silu_attention_eager",
    "silu_attention_naive",
]
