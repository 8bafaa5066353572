"""The k smallest of keys that are spread over ranks, the same for any number of ranks."""

import torch
from torch import Tensor

from .exchange import Exchange

_DIGIT = 16  # bits that one all-reduced histogram decides


def select_smallest(scores: Tensor, ids: Tensor, k: int, exchange: Exchange, *, score_bits: int = 64) -> Tensor:
    """Return which pairs of this rank, bool [n], are among the k smallest (score, id) of all ranks. Collective.

    A radix selection: each round all-reduces one histogram of the next 16 bits of the keys that are still undecided,
    and ends early when a digit separates exactly k.

    Args:
        scores: int64 [n], at least 0 and below 2^score_bits.
        ids: int64 [n]; pairs are distinct over all ranks.
        k: at most the number of pairs on all ranks.
    """
    selected = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    undecided = torch.arange(len(ids), device=ids.device)
    unsigned_order = ids ^ torch.iinfo(torch.int64).min  # its digits sort as the signed ids do
    digits = [(scores, shift) for shift in range(score_bits - _DIGIT, -1, -_DIGIT)]
    digits += [(unsigned_order, shift) for shift in range(64 - _DIGIT, -1, -_DIGIT)]
    for values, shift in digits:
        if k == 0:
            return selected
        digit = (values[undecided] >> shift) & (2**_DIGIT - 1)
        histogram = exchange.sum_tensor(torch.bincount(digit, minlength=2**_DIGIT).cpu())
        up_to = torch.cumsum(histogram, 0)
        cut = int(torch.searchsorted(up_to, k))
        assert cut < len(up_to), "k is more than there are pairs"
        k -= int(up_to[cut] - histogram[cut])
        selected[undecided[digit < cut]] = True
        undecided = undecided[digit == cut]
        if k == int(histogram[cut]):
            selected[undecided] = True
            return selected
    raise AssertionError("pairs must be distinct")
