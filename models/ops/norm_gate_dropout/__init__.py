"""LayerNorm, gate and keyed dropout in one: what an HSTU layer does between attention and its projection."""

import torch
from grzoo.models.ops.host import available
from grzoo.models.ops.triton_available import takes_triton
from torch import Tensor

from .eager import norm_gate_dropout_eager
from .host import norm_gate_dropout_host
from .naive import norm_gate_dropout_naive


def norm_gate_dropout(
    x: Tensor, gate: Tensor, *, eps: float, p: float = 0.0, token_keys: Tensor | None = None, site: int = 0
) -> Tensor:
    """`norm_gate_dropout_naive` (formula and shapes there) by the fastest path for these tensors.

    On a CPU: C++, for float32; on a GPU: Triton, where it is installed; else three operations of PyTorch.
    """
    function = norm_gate_dropout_eager
    if x.device.type == "cpu" and x.dtype == gate.dtype == torch.float32 and available():
        function = norm_gate_dropout_host
    elif x.dtype != torch.float64 and takes_triton(x):
        from .triton import norm_gate_dropout_triton as function
    return function(x, gate, eps=eps, p=p, token_keys=token_keys, site=site)


__all__ = ["norm_gate_dropout", "norm_gate_dropout_eager", "norm_gate_dropout_host", "norm_gate_dropout_naive"]
