"""Which tiles of which sequences the programs of a Triton kernel work on."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from grzoo.models.packing import JaggedLayout
from torch import Tensor

TILES_PER_SEGMENT = 16  # of a program that sums bias gradients: enough programs, few partial sums


@dataclass
class RowTiles:
    """Tiles of rows (or of columns), the most work first: int32 [n] each."""

    sequence: Tensor
    block: Tensor


@dataclass
class DiagonalTiles:
    """Tiles of pairs sorted by their distance below the diagonal and cut into segments of one distance.

    Attributes:
        sequence, block: int32 [n], the sequence of a tile and which block of rows it is.
        first: int32 [segments + 1], the first tile of each segment.
        distance: int32 [segments], blocks between rows and columns.
    """

    sequence: Tensor
    block: Tensor
    first: Tensor
    distance: Tensor


def row_tiles(layout: JaggedLayout, tile: int, *, by_rows: bool) -> RowTiles:
    """Cut every sequence into blocks of `tile` rows; a late row, or an early column, meets more partners."""
    key = ("row_tiles", tile, by_rows)
    if key not in layout.cache:
        blocks = [(n, b) for n, length in enumerate(layout.lengths) for b in range(-(-length // tile))]
        if by_rows:
            blocks.sort(key=lambda block: -block[1])
        else:
            blocks.sort(key=lambda block: block[1] * tile - layout.lengths[block[0]])
        columns = np.asarray(blocks, dtype=np.int32).reshape(-1, 2).T
        layout.cache[key] = RowTiles(*(_on(column.copy(), layout.cu_seq_lens.device) for column in columns))
    tiles: RowTiles = layout.cache[key]
    return tiles


def diagonal_tiles(layout: JaggedLayout, tile: int) -> DiagonalTiles:
    """All tiles of pairs j <= i."""
    key = ("diagonal_tiles", tile)
    if key not in layout.cache:
        counts = -(-np.asarray(layout.lengths, dtype=np.int64) // tile)
        blocks = _up_to(counts)
        pairs = blocks + 1  # a block of rows meets as many blocks of columns
        distance = _up_to(pairs)
        order = np.argsort(distance, kind="stable")
        first, distances = [0], []
        for number, size in enumerate(np.bincount(distance).tolist()):
            for begin in range(0, size, TILES_PER_SEGMENT):
                first.append(first[-1] + min(TILES_PER_SEGMENT, size - begin))
                distances.append(number)
        sequences = np.repeat(np.arange(len(counts)), counts)
        columns = (np.repeat(sequences, pairs)[order], np.repeat(blocks, pairs)[order], first, distances)
        layout.cache[key] = DiagonalTiles(*(_on(column, layout.cu_seq_lens.device) for column in columns))
    tiles: DiagonalTiles = layout.cache[key]
    return tiles


def _up_to(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0 .. n - 1 for each n of counts, one behind the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _on(values: npt.ArrayLike, device: torch.device) -> Tensor:
    """int32 [n] in memory of its own: kernels are compiled anew for a tensor that is aligned otherwise."""
    return torch.from_numpy(np.asarray(values, dtype=np.int32)).to(device, non_blocking=True)
