"""Groups of sequences of nearly equal length: how the eager path avoids padded work."""

from dataclasses import dataclass, field

import torch
from grzoo.models.packing import JaggedLayout
from torch import Tensor

from .bias import time_buckets

# Scores of one block of rows that are alive at once: fits the L2 cache of a CPU core, fills a GPU.
_BLOCK_AREA = {"cpu": 1 << 16}
_DEVICE_BLOCK_AREA = 1 << 24
_BLOCK_ROWS = {"cpu": 64}
_DEVICE_BLOCK_ROWS = 256
_BUCKET_CACHE_BYTES = 64 << 20


@dataclass
class Group:
    """b sequences padded to the longest of them.

    Attributes:
        index: int64 [b * length], the token at each place, T at a padded place.
        size: b.
        length: length of the longest sequence.
        blocks: [first row, end) of the row blocks; block columns are 0..end since keys after the last row are masked.
    """

    index: Tensor
    size: int
    length: int
    blocks: list[tuple[int, int]]


@dataclass
class GroupPlan:
    """The groups of a layout, and the time buckets of their blocks as far as they fit the cache."""

    groups: list[Group]
    timestamps: Tensor | None  # float64 [T + 1]
    target_timestamps: Tensor | None
    cached_bytes: int = 0
    cache: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def buckets(self, group_number: int, first_row: int, end: int, num_buckets: int) -> Tensor:
        """int64 [b * rows * end], the time bucket of each pair of a block."""
        cache_key = (group_number, first_row, num_buckets)
        if cache_key not in self.cache:
            group = self.groups[group_number]
            assert self.timestamps is not None and self.target_timestamps is not None
            index = group.index.view(group.size, group.length)
            buckets = time_buckets(
                self.target_timestamps[index[:, first_row:end]], self.timestamps[index[:, :end]], num_buckets
            )
            small = buckets.flatten().to(torch.uint8 if num_buckets <= 256 else torch.int32)
            if self.cached_bytes + small.nbytes > _BUCKET_CACHE_BYTES:
                return small.long()
            self.cached_bytes += small.nbytes
            self.cache[cache_key] = small
        return self.cache[cache_key].long()


def plan_groups(layout: JaggedLayout, num_heads: int) -> GroupPlan:
    """Group the sequences of a layout by length; computed once per forward pass and shared by the layers."""
    cache_key = ("hstu_groups", num_heads)
    if cache_key not in layout.cache:
        device = layout.cu_seq_lens.device
        area = _BLOCK_AREA.get(device.type, _DEVICE_BLOCK_AREA)
        rows = _BLOCK_ROWS.get(device.type, _DEVICE_BLOCK_ROWS)
        members = group_lengths(layout.lengths, max_area=max(1, area // num_heads), block_rows=rows)
        layout.cache[cache_key] = GroupPlan(
            [_build_group(layout, sequences, rows) for sequences in members],
            _with_padding(layout.timestamps),
            _with_padding(layout.target_timestamps),
        )
    plan: GroupPlan = layout.cache[cache_key]
    return plan


def group_lengths(lengths: list[int], *, max_area: int, block_rows: int) -> list[list[int]]:
    """Partition the non-empty sequences, longest first, into groups of nearly equal length and bounded block area.

    Args:
        lengths: B lengths.
        max_area: largest number of scores of one row block of a group (a single sequence may exceed it).
        block_rows: rows of a block.

    Returns:
        Sequence numbers of each group, the longest first; ties in the order given.
    """
    order = sorted((number for number, length in enumerate(lengths) if length > 0), key=lambda number: -lengths[number])
    groups: list[list[int]] = []
    longest = 0
    for number in order:
        length = lengths[number]
        area = min(longest, block_rows) * longest
        slack = max(4, longest // 8)
        if not groups or length < longest - slack or (len(groups[-1]) + 1) * area > max_area:
            groups.append([])
            longest = length
        groups[-1].append(number)
    return groups


def _build_group(layout: JaggedLayout, sequences: list[int], block_rows: int) -> Group:
    device = layout.cu_seq_lens.device
    length = layout.lengths[sequences[0]]
    starts = layout.cu_seq_lens[torch.tensor(sequences, device=device)]
    counts = torch.tensor([layout.lengths[number] for number in sequences], device=device)
    place = torch.arange(length, device=device)
    index = torch.where(place < counts.unsqueeze(1), starts.unsqueeze(1) + place, layout.num_tokens)
    blocks = [(row, min(row + block_rows, length)) for row in range(0, length, block_rows)]
    return Group(index.flatten(), len(sequences), length, blocks)


def _with_padding(times: Tensor | None) -> Tensor | None:
    return None if times is None else torch.nn.functional.pad(times.double(), (0, 1))
