"""Who owns an id: 65,536 hashed buckets, of which each rank has a contiguous range.

The one place where this is decided: lookup, loading, saving and tests all call these functions.
"""

from torch import Tensor

from .keyed import mix64

HASH_VERSION = 1  # stored in checkpoints; change it with any change of `bucket`
NUM_BUCKETS = 65536

_BUCKET_KEY = 0x5851F42D4C957F2D


def bucket(ids: Tensor) -> Tensor:
    """Return the bucket int64 in [0, NUM_BUCKETS) of each id (any int64), same shape."""
    bits = mix64(ids + _BUCKET_KEY)
    assert isinstance(bits, Tensor)
    return (bits >> 48) & (NUM_BUCKETS - 1)


def owner(ids: Tensor, world_size: int) -> Tensor:
    """Return the rank int64 in [0, world_size) that owns each id, same shape."""
    return (bucket(ids) * world_size) >> 16


def bucket_range(rank: int, world_size: int) -> tuple[int, int]:
    """Return (first, end) of the buckets that `rank` owns: the b with b * world_size >> 16 == rank."""
    return -(-rank * NUM_BUCKETS // world_size), -(-(rank + 1) * NUM_BUCKETS // world_size)
