"""Bytes that the kernels must move per id, and the time below which a step cannot go on a given memory bandwidth.

python -m grzoo.embeddings.kernels.triton.costs --dim 128 --ids 1050000 --unique 350000 --bandwidth 3.35e12

Counted: what has to come from or go to DRAM, in sectors of 32 bytes where access is random. Not counted: launches,
tables that stay in the L2 cache (chunk pointers, quantiles), waiting. It is a floor, not a prediction.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

_SECTOR = 32
_ID, _TABLE, _HANDLE, _INDEX = 8, 4, 8, 8


def probe_bytes(load: float) -> float:
    """Bytes of records that a search for a present key reads at a load factor: two records of 16 bytes to a sector."""
    probes = (1 + 1 / (1 - load)) / 2  # linear probing
    return _SECTOR * (1 + (probes - 1) / 2)


def find_bytes(load: float = 0.5) -> float:
    """Per distinct id: the key in, records, the handle out."""
    return _ID + _TABLE + probe_bytes(load) + _HANDLE


def gather_bytes(dim: int) -> float:
    """Per row: the handle, the row in, the row out."""
    return _HANDLE + 2 * 4 * dim


def update_bytes(dim: int, wide_slots: int) -> float:
    """Per row: gradient in; row and each wide slot in and out; the step's sector in and out; corrections out and in."""
    wide = 4 * dim * (1 + 2 * (1 + wide_slots))
    corrections = 16 if wide_slots == 2 else 0
    return wide + 2 * _HANDLE + 2 * _SECTOR + corrections


def unique_bytes() -> float:
    """Per id: keys, the scratch table (cleared, claimed, read), slots, first-flags, ranks by a prefix sum, inverse."""
    claim = _ID + _TABLE + 16 + _INDEX  # 16: the table is cleared, four bytes for each of two to four slots per id
    flags = _INDEX + 4 + 4 + 4 + 1  # slots and positions in, flags out
    ranks = 1 + 3 * _INDEX + 1  # prefix sum, minus one, positions of the flags
    return claim + flags + ranks + 2 * _INDEX


def sort_bytes() -> float:
    """Per id: a radix sort of 64-bit keys with 64-bit positions, eight passes over both, one that counts."""
    return 8 * 2 * (8 + 8) + 8


@dataclass(frozen=True)
class Floor:
    """Bytes of the phases of a step."""

    forward: float  # unique, find, gather of distinct rows, one row per id
    evaluation: float  # the same without the leaf of distinct rows: rows go straight to their places
    backward: float  # sort, segment sum, update


def floor(dim: int, ids: int, unique: int, *, wide_slots: int = 2, load: float = 0.5) -> Floor:
    """Return the bytes of a step on `ids` ids of which `unique` are distinct; Adam has two wide slots."""
    row = 4 * dim
    lookup = ids * unique_bytes() + unique * find_bytes(load)
    expand = unique * row + ids * (_INDEX + row)  # each distinct row comes from DRAM once at best
    segments = ids * (row + 2 * _INDEX) + unique * row
    return Floor(
        forward=lookup + unique * gather_bytes(dim) + expand,
        evaluation=lookup + expand,
        backward=ids * sort_bytes() + segments + unique * update_bytes(dim, wide_slots),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the bytes per id and the floor in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--ids", type=int, default=1_050_000, help="ids of a step")
    parser.add_argument("--unique", type=int, default=350_000, help="distinct ids of a step")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes per second")
    options = parser.parse_args(arguments)
    step = floor(options.dim, options.ids, options.unique)
    print(f"unique {unique_bytes():.0f} B/id, find {find_bytes():.0f} B, gather {gather_bytes(options.dim):.0f} B,")
    print(f"sort {sort_bytes():.0f} B/id, update by Adam {update_bytes(options.dim, 2):.0f} B (per distinct id)")
    phases = {**vars(step), "training": step.forward + step.backward}
    for phase, total in phases.items():
        print(f"{phase:10s} {total / 1e6:7.0f} MB  {1e3 * total / options.bandwidth:.3f} ms")


if __name__ == "__main__":
    main()
