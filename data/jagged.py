"""Jagged arrays: rows of different lengths as one flat array of values and the offsets of the rows."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64 = NDArray[np.int64]


def offsets_of(lengths: ArrayLike) -> Int64:
    """Offsets int64 [n + 1] of rows of the given lengths [n]: row r is `values[offsets[r]:offsets[r + 1]]`."""
    counts = np.asarray(lengths)
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def ranges(starts: ArrayLike, lengths: ArrayLike) -> Int64:
    """The concatenation of `arange(start, start + length)` of every row, int64 [sum of lengths]."""
    counts = np.asarray(lengths)
    offsets = offsets_of(counts)
    index = np.arange(offsets[-1], dtype=np.int64)
    index += np.repeat(np.asarray(starts, dtype=np.int64) - offsets[:-1], counts)
    return index


def cut_rows(lengths: Int64, values: int) -> list[tuple[int, int]]:
    """Ranges (first, last) of neighbouring rows with at most about `values` values each; at least one range."""
    group = (np.cumsum(lengths) - lengths) // values
    edges = np.flatnonzero(np.diff(group)) + 1
    bounds = [0, *edges.tolist(), len(lengths)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def within(lengths: ArrayLike) -> Int64:
    """Position of every element inside its row, int64 [sum of lengths]: 0, 1, ..., restarting at each row."""
    counts = np.asarray(lengths)
    return ranges(np.zeros(len(counts), dtype=np.int64), counts)
