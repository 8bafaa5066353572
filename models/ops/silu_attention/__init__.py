"""Silu attention over packed samples under a visibility mask: what the ranking models attend with."""

import logging
from collections.abc import Callable

import torch
from grzoo.models.ops.triton_available import has_triton
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
    """`silu_attention_naive` (formula and shapes there) by the fastest path for these tensors.

    On a GPU: the Triton kernels, where Triton is installed; elsewhere, and for float64, the eager one (said once).
    """
    if query.device.type == "cuda" and query.dtype != torch.float64 and has_triton():
        function = silu_attention_triton
    else:
        function = silu_attention_eager
        if "eager" not in _said:
            _said.add("eager")
            logger.info("silu attention runs as grouped tensor operations (eager): this mask has no C++ kernel")
    return function(query, key, value, layout, visibility, divisors=divisors, scale=scale)


def silu_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    visibility: Visibility,
    *,
    divisors: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """`silu_attention_naive` (formula and shapes there) by Triton kernels; see triton.py, which needs Triton."""
    from .triton import silu_attention_triton as function

    return function(query, key, value, layout, visibility, divisors=divisors, scale=scale)


SILU_ATTENTION_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "auto": silu_attention_auto,
    "eager": silu_attention_eager,
    "naive": silu_attention_naive,
    "triton": silu_attention_triton,
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
    "silu_attention_triton",
]
