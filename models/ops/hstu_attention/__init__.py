"""HSTU attention over packed sequences: pointwise silu instead of softmax, relative position and time bias."""

from grzoo.models.packing import JaggedLayout
from torch import Tensor

from .eager import hstu_attention_eager
from .naive import hstu_attention_naive

HSTU_ATTENTION_FUNCTIONS = {"eager": hstu_attention_eager, "naive": hstu_attention_naive}


def hstu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    *,
    max_length: int,
    position_table: Tensor,
    time_table: Tensor | None = None,
    implementation: str = "eager",
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


__all__ = ["HSTU_ATTENTION_FUNCTIONS", "hstu_attention", "hstu_attention_eager", "hstu_attention_naive"]
