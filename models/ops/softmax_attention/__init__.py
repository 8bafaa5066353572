"""Causal softmax attention over packed sequences."""

from collections.abc import Callable

from grzoo.models.packing import JaggedLayout
from torch import Tensor

from .grouped import softmax_attention_grouped
from .naive import softmax_attention_naive
from .varlen import softmax_attention_varlen, varlen_takes


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, layout: JaggedLayout) -> Tensor:
    """`softmax_attention_naive` (formula and shapes there): packed flash attention where it runs, else groups."""
    function = softmax_attention_varlen if varlen_takes(value) else softmax_attention_grouped
    return function(query, key, value, layout)


SOFTMAX_ATTENTION_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "auto": softmax_attention,
    "grouped": softmax_attention_grouped,
    "varlen": softmax_attention_varlen,
    "naive": softmax_attention_naive,
}

__all__ = [
    "SOFTMAX_ATTENTION_FUNCTIONS",
    "softmax_attention",
    "softmax_attention_grouped",
    "softmax_attention_naive",
    "softmax_attention_varlen",
]
