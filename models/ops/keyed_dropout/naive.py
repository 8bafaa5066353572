"""Ground truth of keyed dropout."""

import torch
from grzoo.embeddings.keyed import fold
from torch import Tensor


def keyed_dropout_naive(x: Tensor, p: float, token_keys: Tensor, site: int) -> Tensor:
    """`y[t, c] = x[t, c] / (1 - p)` where `bits(token_keys[t], site, c) >= p * 2^24`, else 0.

    Args:
        x: [T, C].
        p: probability of a zero, rounded to a multiple of 2^-24.
        token_keys: int64 [T], the key of each token.
        site: which dropout of the model this is.

    Returns:
        [T, C], dtype of `x`.
    """
    columns = torch.arange(x.shape[1], device=x.device)
    token = fold(token_keys, site)
    assert isinstance(token, Tensor)
    bits = fold(token.unsqueeze(1), columns)
    assert isinstance(bits, Tensor)
    uniform = (bits >> 40) & 0xFFFFFF  # the upper 24 bits
    return torch.where(uniform >= round(p * 2**24), x / (1 - p), 0.0).to(x.dtype)
