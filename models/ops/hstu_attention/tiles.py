"""Which tiles of which sequences the programs of a Triton kernel work on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

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
        layout.cache[key] = RowTiles(*_columns(blocks, 2, layout.cu_seq_lens.device))
    tiles: RowTiles = layout.cache[key]
    return tiles


def diagonal_tiles(layout: JaggedLayout, tile: int) -> DiagonalTiles:
    """All tiles of pairs j <= i."""
    key = ("diagonal_tiles", tile)
    if key not in layout.cache:
        counts = [-(-length // tile) for length in layout.lengths]
        found = [(d, n, b) for n, count in enumerate(counts) for b in range(count) for d in range(b + 1)]
        found.sort()
        first, distances = [0], []
        for distance, group in groupby(found, key=lambda entry: entry[0]):
            size = len(list(group))
            for begin in range(0, size, TILES_PER_SEGMENT):
                first.append(first[-1] + min(TILES_PER_SEGMENT, size - begin))
                distances.append(distance)
        device = layout.cu_seq_lens.device
        _, sequence, block = _columns(found, 3, device)
        whole = [torch.tensor(x, dtype=torch.int32).to(device, non_blocking=True) for x in (first, distances)]
        layout.cache[key] = DiagonalTiles(sequence, block, *whole)
    tiles: DiagonalTiles = layout.cache[key]
    return tiles


def _columns(entries: Sequence[tuple[int, ...]], width: int, device: torch.device) -> list[Tensor]:
    table = torch.tensor(entries, dtype=torch.int32).reshape(-1, width).T.contiguous()
    return list(table.to(device, non_blocking=True))
