"""Keyed dropout in few passes over memory."""

import torch
from grzoo.embeddings.keyed import mix64
from torch import Tensor

from .row_keys import row_keys

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_COLUMN_SALT = 0x632BE59BD9B4E019
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)
_CHUNK = 1 << 14  # elements: the two int64 buffers of a chunk stay in the cache of a core


def keyed_dropout_eager(x: Tensor, p: float, token_keys: Tensor, site: int) -> Tensor:
    """`keyed_dropout_naive` (formula and shapes there), the same mask bit for bit; keeps one byte per element."""
    dropped = dropout_mask(row_keys(token_keys, site), x.shape[1], p)
    return x.masked_fill(dropped, 0) * (1 / (1 - p))


def dropout_mask(row_keys: Tensor, num_columns: int, p: float) -> Tensor:
    """bool [T, C]: True where `fold(row_keys[t], c) >> 40` (unsigned) is below `p * 2^24`."""
    threshold = round(p * 2**24)
    columns = mix64(torch.arange(num_columns, device=row_keys.device) + _COLUMN_SALT) + _GOLDEN
    dropped = torch.empty(row_keys.numel(), num_columns, dtype=torch.bool, device=row_keys.device)
    rows = max(1, _CHUNK // max(1, num_columns)) if row_keys.device.type == "cpu" else max(1, row_keys.numel())
    for keys, out in zip(row_keys.split(rows), dropped.split(rows), strict=True):
        # fold(key, c) = mix64(key + columns[c]); its last xor-shift leaves the upper 24 bits alone.
        bits = keys.unsqueeze(1) + columns
        shifted = bits >> 30
        bits ^= shifted.bitwise_and_((1 << 34) - 1)
        bits *= _MULTIPLIER_1
        torch.bitwise_right_shift(bits, 27, out=shifted)
        bits ^= shifted.bitwise_and_((1 << 37) - 1)
        bits *= _MULTIPLIER_2
        torch.lt((bits >> 40).bitwise_and_(0xFFFFFF), threshold, out=out)
    return dropped
