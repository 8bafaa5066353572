"""LayerNorm, gate and keyed dropout by PyTorch's own operations."""

import torch
from grzoo.models.ops.keyed_dropout import keyed_dropout
from torch import Tensor


def norm_gate_dropout_eager(
    x: Tensor, gate: Tensor, *, eps: float, p: float = 0.0, token_keys: Tensor | None = None, site: int = 0
) -> Tensor:
    """`norm_gate_dropout_naive` (formula and shapes there) in three operations."""
    gated = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) * gate
    return gated if token_keys is None else keyed_dropout(gated, p, token_keys, site)
