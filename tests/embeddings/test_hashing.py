"""S3: ownership is one unsigned hash of any int64, in contiguous bucket ranges for any number of ranks."""

import pytest
import torch
from grzoo.embeddings.hashing import HASH_VERSION, NUM_BUCKETS, bucket, bucket_range, owner

IDS = torch.cat([torch.arange(-50_000, 50_000), torch.tensor([2**63 - 1, -(2**63)])])


def test_s3_the_hash_is_frozen() -> None:
    """Checkpoints depend on it: change HASH_VERSION with these numbers."""
    ids = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    mask = 2**64 - 1

    def reference(i: int) -> int:
        z = (i + 0x5851F42D4C957F2D) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return (z ^ (z >> 31)) >> 48

    assert HASH_VERSION == 1
    assert bucket(ids).tolist() == [reference(i) for i in ids.tolist()]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 8, 128, 65536])
def test_s3_owner_and_bucket_ranges_say_the_same(world: int) -> None:
    buckets, owners = bucket(IDS), owner(IDS, world)
    assert buckets.min() >= 0 and buckets.max() < NUM_BUCKETS
    edges = [bucket_range(r, world) for r in range(world)]
    assert edges[0][0] == 0 and edges[-1][1] == NUM_BUCKETS
    assert all(a[1] == b[0] for a, b in zip(edges[:-1], edges[1:], strict=True))
    starts = torch.tensor([first for first, _ in edges])
    assert torch.equal(owners, torch.searchsorted(starts, buckets, right=True) - 1)


def test_s3_consecutive_and_negative_ids_are_spread_evenly() -> None:
    counts = torch.bincount(owner(IDS, 8), minlength=8)
    assert (counts / counts.float().mean() - 1).abs().max() < 0.05
