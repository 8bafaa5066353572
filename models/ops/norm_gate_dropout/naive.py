"""Ground truth of LayerNorm, gate and keyed dropout in one."""

import torch
from grzoo.models.ops.keyed_dropout.naive import keyed_dropout_naive
from torch import Tensor


def norm_gate_dropout_naive(
    x: Tensor, gate: Tensor, *, eps: float, p: float = 0.0, token_keys: Tensor | None = None, site: int = 0
) -> Tensor:
    """`y[t] = dropout(LN(x[t]) * gate[t])` with `LN(x) = (x - mean) / sqrt(var + eps)`, without weight and bias.

    Args:
        x, gate: [T, C].
        eps: positive, added to the variance.
        p: probability of dropout, see `keyed_dropout_naive`.
        token_keys: int64 [T], the key of each token; None: nothing is dropped.
        site: which dropout of the model this is.

    Returns:
        [T, C], dtype of `x`; computed in float32 (float64 when given).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    normed = torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], eps=eps) * gate.to(wide)
    return (normed if token_keys is None else keyed_dropout_naive(normed, p, token_keys, site)).to(x.dtype)
