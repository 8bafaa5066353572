"""HSTU attention over packed sequences: pointwise silu instead of softmax, relative position and time bias."""

from collections.abc import Callable

import torch
from grzoo.models.ops.host import available
from grzoo.models.ops.triton_available import takes_triton
from grzoo.models.packing import JaggedLayout
from torch import Tensor

from .eager import hstu_attention_eager
from .host import hstu_attention_host
from .naive import hstu_attention_naive


def hstu_attention_auto(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    *,
    max_length: int,
    position_table: Tensor,
    time_table: Tensor | None = None,
) -> Tensor:
    """`hstu_attention_naive` (formula and shapes there) by the fastest path for these tensors.

    On a CPU: the C++ path, unless there is no compiler (said once); on a GPU: the Triton kernels, where Triton is
    installed. The eager one elsewhere, and for float64.
    """
    function = hstu_attention_eager
    if query.dtype != torch.float64:
        if query.device.type == "cpu" and available():
            function = hstu_attention_host
        elif takes_triton(query):
            function = hstu_attention_triton
    return function(
        query, key, value, layout, max_length=max_length, position_table=position_table, time_table=time_table
    )


def hstu_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    *,
    max_length: int,
    position_table: Tensor,
    time_table: Tensor | None = None,
) -> Tensor:
    """`hstu_attention_naive` (formula and shapes there) by Triton kernels; see triton.py, which needs Triton."""
    from .triton import hstu_attention_triton as function

    return function(
        query, key, value, layout, max_length=max_length, position_table=position_table, time_table=time_table
    )


HSTU_ATTENTION_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "auto": hstu_attention_auto,
    "eager": hstu_attention_eager,
    "host": hstu_attention_host,
    "naive": hstu_attention_naive,
    "triton": hstu_attention_triton,
}


def hstu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    *,
    max_length: int,
    position_table: Tensor,
    time_table: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`hstu_attention_naive` (which holds the formula and the shapes) by the named implementation.

    Raises:
        ValueError: for an unknown implementation.
    """
    if implementation not in HSTU_ATTENTION_FUNCTIONS:
        raise ValueError(f"No HSTU attention named {implementation!r}; choose from {list(HSTU_ATTENTION_FUNCTIONS)}.")
    function = HSTU_ATTENTION_FUNCTIONS[implementation]
    return function(
        query, key, value, layout, max_length=max_length, position_table=position_table, time_table=time_table
    )


__all__ = [
    "HSTU_ATTENTION_FUNCTIONS",
    "hstu_attention",
    "hstu_attention_auto",
    "hstu_attention_eager",
    "hstu_attention_host",
    "hstu_attention_naive",
    "hstu_attention_triton",
]
