"""Silu attention over packed samples under a visibility mask: what the ranking models attend with."""

from collections.abc import Callable

import torch
from grzoo.models.ops.host import available
from grzoo.models.ops.triton_available import takes_triton
from grzoo.models.packing import JaggedLayout
from torch import Tensor

from .eager import silu_attention_eager
from .host import silu_attention_host
from .naive import silu_attention_naive
from .visibility import ALWAYS, NEVER, STATIC, Visibility


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

    On a CPU: the C++ path, unless there is no compiler (said once); on a GPU: the Triton kernels, where Triton is
    installed. The eager one elsewhere, and for float64.
    """
    function = silu_attention_eager
    if query.dtype != torch.float64:
        if query.device.type == "cpu" and available():
            function = silu_attention_host
        elif takes_triton(query):
            function = silu_attention_triton
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
    "host": silu_attention_host,
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
    "silu_attention_host",
    "silu_attention_naive",
    "silu_attention_triton",
]
