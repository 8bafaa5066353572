# mypy: ignore-errors
"""Functions of Triton kernels: keyed randomness (`embeddings/keyed.py`) and the home slot of a key."""

import triton
import triton.language as tl


@triton.jit
def mix64(z):
    """The finaliser of splitmix64 on uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def fold(key, word):
    """Fold one more uint64 word into a uint64 key."""
    return mix64(key + 0x9E3779B97F4A7C15 + mix64(word + 0x632BE59BD9B4E019))


@triton.jit
def home_slot(tables, ids, capacity):
    """Return the first slot int64 to look at for keys (tables int32, ids int64); capacity is a power of two.

    Mixed twice, once more than `hashing.bucket`: the ids of one rank share the upper bits of their bucket hash.
    """
    bits = mix64(ids.to(tl.uint64) + 0x5851F42D4C957F2D)
    bits = mix64(bits + tables.to(tl.uint64) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03)
    return bits.to(tl.int64) & (capacity - 1)
