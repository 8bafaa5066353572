"""The key of each token at one dropout of a model."""

import torch
from grzoo.embeddings.keyed import fold
from torch import Tensor


@torch.library.custom_op("grzoo::row_keys", mutates_args=())
def row_keys(token_keys: Tensor, site: int) -> Tensor:
    """`fold(token_keys, site)`, int64 [T]; an op, since torch.compile cannot trace 64-bit Python ints."""
    keys = fold(token_keys, site)
    assert isinstance(keys, Tensor)
    return keys


@row_keys.register_fake
def _(token_keys: Tensor, site: int) -> Tensor:
    return torch.empty_like(token_keys, memory_format=torch.contiguous_format)
