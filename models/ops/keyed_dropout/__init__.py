"""Dropout whose mask belongs to (token, site, column), so that micro-batches and ranks do not change it."""

import torch
from grzoo.models.ops.host import available
from grzoo.models.ops.triton_available import takes_triton
from torch import Tensor

from .eager import keyed_dropout_eager
from .host import keyed_dropout_host
from .naive import keyed_dropout_naive


def keyed_dropout(x: Tensor, p: float, token_keys: Tensor, site: int) -> Tensor:
    """`keyed_dropout_naive` (formula and shapes there) by the fastest path for these tensors, the same bits by each."""
    function = keyed_dropout_eager
    if x.device.type == "cpu" and x.dtype == torch.float32 and available():
        function = keyed_dropout_host
    elif x.dtype != torch.float64 and takes_triton(x):
        from .triton import keyed_dropout_triton as function
    return function(x, p, token_keys, site)


__all__ = ["keyed_dropout", "keyed_dropout_eager", "keyed_dropout_host", "keyed_dropout_naive"]
