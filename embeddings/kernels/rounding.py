"""Rounding of float32 rows to bfloat16, in plain PyTorch: the definition that every backend must reproduce bit for bit.

bfloat16 is the upper half of a float32. "nearest" takes the nearer neighbour, ties to the even one. "stochastic" adds
16 random bits to the lower half and cuts it off: the result is the upper neighbour as often as the value is near to it,
so that its mean is the value, and steps that are smaller than half the distance of neighbours are not lost.
"""

from collections.abc import Sequence

import torch
from grzoo.embeddings.keyed import Word, fold
from torch import Tensor

from .base import RowInit

_KEY = 0x726F756E64  # apart from the keys of initial values


def table_keys(inits: Sequence[RowInit]) -> Tensor:
    """Return the keys int64 [logical tables] of the rounding of tables, from those of their initial values."""
    keys = [fold(init.key, _KEY) for init in inits]
    return torch.tensor(keys, dtype=torch.int64, device="cpu")


def row_keys(of_tables: Tensor, tables: Tensor, ids: Tensor) -> Tensor:
    """Return the keys int64 [n] of rows: of_tables int64 [logical tables], tables int32 [n], ids int64 [n]."""
    keys = fold(of_tables[tables.long()], ids)
    assert isinstance(keys, Tensor)
    return keys


def round_nearest(values: Tensor) -> Tensor:
    """Return bfloat16 of float32 values, ties to even."""
    return values.to(torch.bfloat16)


def round_stochastic(values: Tensor, keys: Tensor, steps: Tensor) -> Tensor:
    """Return bfloat16 [n, dim] of float32 values [n, dim], rounded up or down by the bits of (key, step, column).

    keys int64 [n] are those of the rows (`row_keys`), steps int64 [n] count their updates, this one included. Infinite
    values and NaN stay what they are.
    """
    columns = torch.arange(values.shape[1], dtype=torch.int64, device=values.device)
    of_row: Word = fold(keys, steps)
    assert isinstance(of_row, Tensor)
    bits = fold(of_row[:, None], columns)
    assert isinstance(bits, Tensor)
    noise = ((bits >> 48) & 0xFFFF).to(torch.int32)
    upper = (values.view(torch.int32) + noise) >> 16
    rounded = upper.to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isnan(), values.to(torch.bfloat16), rounded)
