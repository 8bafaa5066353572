"""Negative items for sampled softmax, drawn by keys: the same for any number of ranks, micro-batches and workers."""

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .keyed import SITE_NEGATIVE, SITE_SHARED_NEGATIVE, UInt64, below, fold, keyed
from .windows import Int64, Samples, Windows

_BLOCK = 1 << 15


class ItemLogQ:
    """log q(item) with q(item) = count(item) / total count, the law of an item drawn from the trained positions.

    ids: int64 [n] unique.  counts: int [n], events of the item in the train split; 0 counts as 1.
    """

    def __init__(self, ids: ArrayLike, counts: ArrayLike) -> None:
        raw = np.asarray(ids, dtype=np.int64)
        order = np.argsort(raw, kind="stable")
        weights = np.maximum(np.asarray(counts, dtype=np.float64), 1.0)[order]
        if not len(raw):
            raise ValueError("the catalogue is empty: there is no item to draw")
        self.ids = raw[order]
        self.values = np.log(weights / weights.sum()).astype(np.float32)

    def __call__(self, ids: ArrayLike) -> NDArray[np.float32]:
        """log q, float32, shape of `ids`; an item outside the catalogue gets that of the rarest item."""
        wanted = np.asarray(ids, dtype=np.int64)
        at = np.minimum(np.searchsorted(self.ids, wanted), len(self.ids) - 1)
        return np.where(self.ids[at] == wanted, self.values[at], self.values.min())


class Negatives(Protocol):
    """How a collator draws negatives: per position, or once for all positions of a step."""

    num_negatives: int


class UniformNegatives:
    """`num_negatives` items per position, uniform over the catalogue with replacement (HSTU's protocol).

    ids: int64 [n], the items to draw from, in the catalogue's order.
    """

    def __init__(self, ids: ArrayLike, num_negatives: int) -> None:
        self.ids = np.asarray(ids, dtype=np.int64)
        self.num_negatives = _checked(num_negatives, len(self.ids))

    def draw(self, token_keys: UInt64) -> Int64:
        """Items int64 [T, num_negatives] of the tokens with keys uint64 [T]."""
        sites = fold(token_keys, SITE_NEGATIVE)
        out = np.empty((len(sites), self.num_negatives), dtype=np.int64)
        numbers = np.arange(self.num_negatives)
        # Blocks that stay in the cache: the draw is 3x faster than in one piece.
        rows = max(1, _BLOCK // self.num_negatives)
        for first in range(0, len(sites), rows):
            bits = fold(sites[first : first + rows, None], numbers)
            np.take(self.ids, below(bits, len(self.ids)), out=out[first : first + rows])
        return out


class SharedNegatives:
    """`num_negatives` items for all positions of a step: the labels of positions drawn from the global batch.

    Popular items are drawn more often; `log_q` is what a logQ-corrected sampled softmax subtracts.
    """

    def __init__(self, ids: ArrayLike, counts: ArrayLike, num_negatives: int) -> None:
        self.log_q = ItemLogQ(ids, counts)
        self.num_negatives = _checked(num_negatives, len(self.log_q.ids))

    def draw(self, windows: Windows, samples: Samples, seed: int, step: int) -> Int64:
        """Items int64 [num_negatives] (none when nothing is trained) for the step whose global batch is `samples`."""
        ends = np.cumsum(samples.num_labels)
        total = int(ends[-1]) if len(ends) else 0
        if not total:
            return np.zeros(0, dtype=np.int64)
        bits = fold(keyed(seed, SITE_SHARED_NEGATIVE, step), np.arange(self.num_negatives))
        positions = below(bits, total)
        sample = np.searchsorted(ends, positions, side="right")
        event = samples.end[sample] - (ends[sample] - positions)
        return windows.dataset.events(samples.rows[sample], event)


class AllItems:
    """Every item of the catalogue for all positions of a step: what a softmax over the whole catalogue needs.

    ids: int64 [n] unique, the catalogue.
    """

    def __init__(self, ids: ArrayLike) -> None:
        self.ids = np.asarray(ids, dtype=np.int64)
        self.num_negatives = _checked(max(1, len(self.ids)), len(self.ids))


def _checked(num_negatives: int, num_items: int) -> int:
    if num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1, got {num_negatives}; pass negatives=None for none")
    if not num_items:
        raise ValueError("the catalogue is empty: there is no item to draw")
    return num_negatives
