"""Unique pairs and deterministic segment sums on the device."""

import torch
import triton
from grzoo.embeddings.kernels.base import Unique
from torch import Tensor

from . import function_kernels as kernels
from .launch import WIDER, blocks, on

_BLOCK = 64 * WIDER  # see index.BLOCK


def unique(ids: Tensor, tables: Tensor | None = None) -> Unique:
    """Return the distinct ids (or pairs) in first-seen order: see Backend.unique. Waits for the device once.

    Through a hash table of positions, two launches and a prefix sum: no sort; the same result in any order of events.
    """
    n, device = len(ids), ids.device
    assert n < 1 << 31
    capacity = max(_BLOCK, triton.next_power_of_2(2 * n))
    owners = torch.full((capacity,), -1, dtype=torch.int32, device=device)
    slots = torch.empty(n, dtype=torch.int64, device=device)
    inverse = torch.empty(n, dtype=torch.int64, device=device)
    if n == 0:
        return Unique(ids, tables, inverse, slots)
    grid, paired = blocks(n, _BLOCK), tables is not None
    ids = ids.contiguous()
    tables = tables.contiguous() if tables is not None else None
    with on(device):
        args = owners, capacity, ids if tables is None else tables, ids, slots, n
        kernels.claim_first_kernel[grid](*args, TABLES=paired, BLOCK=_BLOCK, num_warps=1)
    is_first = owners[slots] == torch.arange(n, dtype=torch.int32, device=device)
    ranks = torch.cumsum(is_first, 0) - 1
    first = is_first.nonzero().flatten()  # waits: how many there are
    counts = torch.zeros(len(first), dtype=torch.int64, device=device)
    with on(device):
        kernels.rank_kernel[grid](owners, slots, ranks, inverse, counts, n, BLOCK=_BLOCK, num_warps=1)
    return Unique(ids[first], None if tables is None else tables[first], inverse, counts)


def segment_sum(values: Tensor, index: Tensor, num_segments: int, out: Tensor | None = None) -> Tensor:
    """Return the sums float32 [num_segments, dim], each in the order of `index`: see Backend.segment_sum.

    A stable sort of the index, then one program per segment. Nothing waits for the device.
    """
    ordered, order = torch.sort(index, stable=True)
    edges = torch.arange(num_segments + 1, dtype=torch.int64, device=index.device)
    return sum_runs(values, order, torch.searchsorted(ordered, edges), out)


def sum_runs(values: Tensor, order: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    """Return s float32 [runs, dim]: s[j] sums values[order[k]] over offsets[j] <= k < offsets[j + 1], in this order.

    values float32 [m, dim], order int64 [n], offsets int64 [runs + 1]. With `out` the sums are added to it in place.
    One launch.
    """
    width, starts, runs = values.shape[1], out is not None, len(offsets) - 1
    target = out if out is not None and out.is_contiguous() else None
    if target is None:
        target = torch.empty(runs, width, dtype=torch.float32, device=values.device)
        if out is not None:
            target.copy_(out)
    if runs and width:
        padded = triton.next_power_of_2(width)
        shape = {"WIDTH": width, "PADDED": padded, "START": starts, "MANY": max(2, min(32, 4096 // padded)), "FEW": 2}
        warps = max(1, min(4, padded // 256))
        with on(values.device):
            kernels.segment_sum_kernel[(runs,)](
                values.contiguous(), order.contiguous(), offsets.contiguous(), target, **shape, num_warps=warps
            )
    if out is None or target is out:
        return target
    return out.copy_(target)
