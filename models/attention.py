"""Entries of transformers' registry of attention functions for layers that bring functions of their own."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from .packing import JaggedLayout


def by_layer(name: str) -> Any:
    """An entry that calls the function of this name of the layer's own op, `layer.attention_functions[name]`."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: JaggedLayout, **kwargs: Any
    ) -> tuple[Tensor, None]:
        functions: Any = getattr(module, "attention_functions", {})
        if name not in functions:
            raise ValueError(f"attn_implementation={name!r} is not available for {type(module).__name__}.")
        return functions[name](query, key, value, layout, **kwargs), None

    return attend


for _name in ("auto", "host", "grouped", "varlen", "naive", "triton"):
    AttentionInterface.register(_name, by_layer(_name))
