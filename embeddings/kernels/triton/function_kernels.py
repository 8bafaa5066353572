# mypy: ignore-errors
"""Kernels of unique and of the deterministic segment sum."""

import triton
import triton.language as tl

from .bits import home_slot


@triton.jit(do_not_specialize=["n"])
def claim_first_kernel(owners, capacity, tables, ids, slots, n, TABLES: tl.constexpr, BLOCK: tl.constexpr):
    """owners[slots[i]] = the first position of a pair that equals pair i. owners: int32 [capacity], all -1 at first.

    A slot is claimed with a position, and a pair is compared with the pair at that position of the *input*: nobody
    waits for a key to be written. Equal pairs then lower the position: the smallest wins in any order of events.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    position = i.to(tl.int32)
    pair_id = tl.load(ids + i, mask=live, other=0)
    pair_table = (i * 0).to(tl.int32)
    if TABLES:
        pair_table = tl.load(tables + i, mask=live, other=0)
    slot = home_slot(pair_table, pair_id, capacity)
    while tl.max(live.to(tl.int32), axis=0) > 0:
        # A look first: most pairs of a long list were seen, and atomics on one address queue. A look that is out of
        # date costs an atomic that changes nothing. A lane that claims nothing (-2 is nowhere) parks out of the way.
        seen = tl.load(owners + slot, mask=live, other=0, volatile=True)
        wants = live & (seen == -1)
        expected = tl.where(wants, position * 0 - 1, position * 0 - 2)
        target = tl.where(wants, slot, i & (capacity - 1))
        claimed = tl.atomic_cas(owners + target, expected, position, sem="relaxed")
        won = wants & (claimed == -1)
        seen = tl.where(wants, claimed, seen)
        other = live & (won == 0)
        same = other & (tl.load(ids + seen, mask=other, other=0) == pair_id)
        if TABLES:
            same = same & (tl.load(tables + seen, mask=other, other=0) == pair_table)
        tl.atomic_min(owners + slot, position, mask=same & (seen > position), sem="relaxed")
        live = other & (same == 0)
        slot = tl.where(live, (slot + 1) & (capacity - 1), slot)
    tl.store(slots + i, slot, mask=i < n)


@triton.jit(do_not_specialize=["n"])
def rank_kernel(owners, slots, ranks, inverse, counts, n, BLOCK: tl.constexpr):
    """inverse[i] = ranks[first position of pair i]; counts (int64, zeros at first) counts them: integers, any order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    first = tl.load(owners + tl.load(slots + i, mask=live, other=0), mask=live, other=0)
    rank = tl.load(ranks + first, mask=live, other=0)
    tl.store(inverse + i, rank, mask=live)
    tl.atomic_add(counts + rank, i * 0 + 1, mask=live, sem="relaxed")


@triton.jit
def segment_sum_kernel(
    values, order, offsets, out,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, START: tl.constexpr, MANY: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """out[j] (+)= values[order[k]] over k in [offsets[j], offsets[j + 1]), one after the other; adds to out with START.

    One program per segment. Loads do not wait for the sum: MANY of them are under way in a long segment.
    """
    segment = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    at = tl.load(offsets + segment)
    end = tl.load(offsets + segment + 1)
    total = tl.zeros((PADDED,), tl.float32)
    if START:
        inside = inside & (at < end)  # a segment without values stays as it is, and costs no access
        total = tl.load(out + segment * WIDTH + column, mask=inside, other=0.0)
    while at + MANY <= end:
        for u in tl.static_range(MANY):
            total += tl.load(values + tl.load(order + at + u) * WIDTH + column, mask=inside, other=0.0)
        at += MANY
    while at < end:
        for u in tl.static_range(FEW):
            here = at + u < end
            source = tl.load(order + at + u, mask=here, other=0)  # beyond the end: row 0, for nothing
            value = tl.load(values + source * WIDTH + column, mask=inside, other=0.0)
            total = tl.where(here, total + value, total)
        at += FEW
    tl.store(out + segment * WIDTH + column, total, mask=inside)
