# mypy: ignore-errors
"""Kernels of the key index: open addressing, linear probing, one 16-byte record per slot.

A record is two int64 words: the id, and `tag` = table * 2^32 + row, which says whether the slot is taken: -1 is empty,
-2 is erased (only inside `KeyIndex.erase`). No id is reserved, since emptiness is not written in the id.
One program is one warp, so that its lanes wait only for each other.
"""

import triton
import triton.language as tl

from .bits import home_slot

EMPTY = tl.constexpr(-1)
ERASED = tl.constexpr(-2)
ROW = tl.constexpr(0xFFFFFFFF)  # the bits of a tag that hold the row


@triton.jit
def load_record(records, slot, live):
    """Return (id, tag) of slots in one 16-byte load per lane."""
    record = tl.multiple_of(records + slot * 2, 16)
    words = record[:, None] + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(words, mask=live[:, None], other=-1))


@triton.jit
def place(records, capacity, tables, ids, rows, live, parked):
    """Claim an empty slot for each live key. The keys are distinct and absent: none is compared.

    A lane without a key changes nothing, but asks all the same: at a slot of its own (parked), since atomics on one
    address queue.
    """
    slot = tl.where(live, home_slot(tables, ids, capacity), parked & (capacity - 1))
    tag = (tables.to(tl.int64) << 32) | rows
    while tl.max(live.to(tl.int32), axis=0) > 0:
        expected = tl.where(live, tag * 0 + EMPTY, tag * 0 - 3)  # -3 is nowhere: lanes that are done change nothing
        seen = tl.atomic_cas(records + slot * 2 + 1, expected, tag, sem="relaxed")
        won = live & (seen == EMPTY)
        tl.store(records + slot * 2, ids, mask=won)
        live = live & (seen != EMPTY)
        slot = tl.where(live, (slot + 1) & (capacity - 1), slot)


@triton.jit(do_not_specialize=["n"])
def find_kernel(records, capacity, tables, ids, found, n, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """found[i] = the row of key i, or its slot (SLOTS); -1 when it is absent. Read only; keys may repeat."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    key_table = tl.load(tables + i, mask=live, other=0)
    key_id = tl.load(ids + i, mask=live, other=0)
    slot = home_slot(key_table, key_id, capacity)
    answer = i * 0 - 1
    while tl.max(live.to(tl.int32), axis=0) > 0:
        record_id, tag = load_record(records, slot, live)
        hit = live & (record_id == key_id) & ((tag >> 32) == key_table)
        if SLOTS:
            answer = tl.where(hit, slot, answer)
        else:
            answer = tl.where(hit, tag & ROW, answer)
        live = live & (tag != EMPTY) & (hit == 0)
        slot = (slot + 1) & (capacity - 1)
    tl.store(found + i, answer, mask=i < n)


@triton.jit(do_not_specialize=["num_free", "used", "n"])
def insert_kernel(
    records, capacity, tables, ids, missing, free, num_free, used, handles, new_handles, n, BLOCK: tl.constexpr
):
    """Give the n keys at the positions `missing` a row each, in their order: freed rows, last freed first, then new.

    Writes the row to handles[missing[k]] and to new_handles[k].
    """
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = k < n
    position = tl.load(missing + k, mask=live, other=0)
    key_table = tl.load(tables + position, mask=live, other=0)
    key_id = tl.load(ids + position, mask=live, other=0)
    again = live & (k < num_free)
    row = tl.where(again, tl.load(free + (num_free - 1 - k), mask=again, other=0), used + k - num_free)
    tl.store(handles + position, row, mask=live)
    tl.store(new_handles + k, row, mask=live)
    place(records, capacity, key_table, key_id, row, live, k)


@triton.jit
def rehash_kernel(old_records, records, capacity, BLOCK: tl.constexpr):
    """Place the keys of BLOCK old slots into a larger, empty index."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    record_id, tag = load_record(old_records, slot, slot >= 0)
    place(records, capacity, (tag >> 32).to(tl.int32), record_id, tag & ROW, tag >= 0, slot)


@triton.jit(do_not_specialize=["n"])
def leader_kernel(records, capacity, slots, leads, n, BLOCK: tl.constexpr):
    """leads[k] = 1 when slots[k] is the first erased one of its run of taken slots, else 0. Read only."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = k < n
    slot = tl.load(slots + k, mask=live, other=0)
    leads_here = live.to(tl.int32)
    while tl.max(live.to(tl.int32), axis=0) > 0:
        slot = (slot - 1) & (capacity - 1)
        tag = tl.load(records + slot * 2 + 1, mask=live, other=EMPTY)
        leads_here = tl.where(live & (tag == ERASED), 0, leads_here)
        live = live & (tag >= 0)
    tl.store(leads + k, leads_here, mask=k < n)


@triton.jit(do_not_specialize=["n"])
def repair_kernel(records, capacity, slots, leads, n, BLOCK: tl.constexpr):
    """From the first erased slot of a run to its end: empty each slot and place its key again from its home slot on.

    A lane owns a run, runs are apart by an empty slot, and a key never moves past its old slot: lanes do not meet.
    One access per turn: a lane either looks at slot `at`, or, with a key in hand, at slot `probe`.
    """
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = (k < n) & (tl.load(leads + k, mask=k < n, other=0) == 1)
    at = tl.load(slots + k, mask=live, other=0)
    probe = at
    holds = k < 0
    held_id = k * 0
    held_tag = k * 0
    while tl.max(live.to(tl.int32), axis=0) > 0:
        record_id, tag = load_record(records, tl.where(holds, probe, at), live)
        tl.debug_barrier()  # reads before the writes of this turn
        ends = live & (holds == 0) & (tag == EMPTY)
        lifts = live & (holds == 0) & (tag >= 0)
        drops = live & holds & (tag == EMPTY)
        clears = live & (holds == 0) & (tag != EMPTY)
        tl.store(records + at * 2 + 1, k * 0 + EMPTY, mask=clears)
        tl.store(records + probe * 2, held_id, mask=drops)
        tl.store(records + probe * 2 + 1, held_tag, mask=drops)
        tl.debug_barrier()  # writes before the reads of the next turn
        held_id = tl.where(lifts, record_id, held_id)
        held_tag = tl.where(lifts, tag, held_tag)
        home = home_slot((tag >> 32).to(tl.int32), record_id, capacity)
        probe = tl.where(lifts, home, (probe + 1) & (capacity - 1))
        skips = clears & (lifts == 0)
        at = tl.where(drops | skips, (at + 1) & (capacity - 1), at)
        holds = (holds | lifts) & (drops == 0)
        live = live & (ends == 0)
