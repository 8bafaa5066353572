"""Law 1: the order of an epoch depends on (seed, epoch, cursor) alone, and serves every row exactly once."""

import numpy as np
import pytest
from grzoo.data import GlobalBatchSampler, permute
from grzoo.data.sampler import GROUP, permute_blocks
from hypothesis import given, settings
from hypothesis import strategies as st


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(st.integers(2, 10**12), st.integers(0, 2**64 - 1), st.integers(0, 2**32))
def test_permute_is_a_function_of_each_position(size: int, key: int, start: int) -> None:
    positions = (start + np.arange(5)) % size
    together = permute(positions, size, key)
    assert together.tolist() == [int(permute([position], size, key)[0]) for position in positions]
    assert (together >= 0).all() and (together < size).all()


def test_permutations_are_about_uniform() -> None:
    first = np.array([permute([0], 5, key)[0] for key in range(1000)])
    assert np.abs(np.bincount(first, minlength=5) - 200).max() < 65  # 5 sigma
    adjacent = permute(np.arange(10_000), 10_000, 1)
    assert abs(np.corrcoef(adjacent[:-1], adjacent[1:])[0, 1]) < 0.05


@given(st.integers(1, 500), st.integers(1, 600), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_an_epoch_serves_every_row_exactly_once(rows: int, batch: int, seed: int, epoch: int, shuffle: bool) -> None:
    sampler = GlobalBatchSampler(rows, batch, seed=seed, shuffle=shuffle)
    served = [sampler.batch_at(*position) for position in sampler.positions(epoch)]
    assert len(served) == len(sampler)
    assert all(len(part) == batch for part in served[:-1])
    assert np.array_equal(np.sort(np.concatenate(served)), np.arange(rows))
    assert shuffle or np.array_equal(np.concatenate(served), np.arange(rows))


@given(st.integers(1, 5000), st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_permute_blocks_is_a_permutation(size: int, block: int, key: int) -> None:
    order = permute_blocks(np.arange(size), size, block, key)
    assert np.array_equal(np.sort(order), np.arange(size))
    some = np.arange(size)[::7]
    assert np.array_equal(permute_blocks(some, size, block, key), order[some])


def test_blocks_are_read_a_group_at_a_time() -> None:
    size, block = 100_000, 50
    order = permute_blocks(np.arange(size), size, block, 5)
    for first in range(0, size, GROUP * block):
        rows = np.sort(order[first : first + GROUP * block])
        runs = 1 + int((np.diff(rows) > 1).sum())
        assert runs <= GROUP + 1, "a group is GROUP runs of neighbouring rows (one may wrap around the end)"
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_blocks_are_part_of_the_position() -> None:
    sampler = GlobalBatchSampler(1000, 10, seed=1, block_size=20)
    assert np.array_equal(np.sort(np.concatenate(list(sampler))), np.arange(1000))
    with pytest.raises(ValueError, match="block_size=20.*has None"):
        GlobalBatchSampler(1000, 10, seed=1).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        GlobalBatchSampler(10, 2, block_size=0)
    with pytest.warns(UserWarning, match="no effect without shuffle"):
        GlobalBatchSampler(10, 2, shuffle=False, block_size=2)


def test_drop_last_serves_whole_batches() -> None:
    sampler = GlobalBatchSampler(10, 4, drop_last=True)
    assert len(sampler) == 2 and [len(batch) for batch in sampler] == [4, 4]


def test_epochs_and_seeds_differ() -> None:
    orders = [GlobalBatchSampler(50, 50, seed=s).batch_at(e, 0).tolist() for s, e in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]


def test_positions_and_step_numbers() -> None:
    sampler = GlobalBatchSampler(10, 4)
    assert sampler.next_position(2, 4) == (2, 8) and sampler.next_position(2, 8) == (3, 0)
    assert [sampler.step_at(*at) for at in ((0, 0), (0, 8), (1, 0), (2, 4))] == [0, 2, 3, 7]


@settings(max_examples=15)
@given(st.integers(1, 60), st.integers(4, 30), st.integers(0, 12))
def test_a_saved_position_continues_the_same_sequence(rows: int, batch: int, stop: int) -> None:
    whole, part = (GlobalBatchSampler(rows, batch, seed=5) for _ in range(2))
    sequence = [b.tolist() for _ in range(3) for b in whole]
    served: list[list[int]] = []
    while len(served) < min(stop, len(sequence)):
        served += [b.tolist() for _, b in zip(range(min(stop, len(sequence)) - len(served)), part, strict=False)]
    rest = GlobalBatchSampler(rows, batch, seed=5)
    rest.load_state_dict(part.state_dict())
    while len(served) < len(sequence):
        served += [b.tolist() for b in rest]
    assert served == sequence


def test_another_global_batch_size_serves_the_rest_of_the_epoch() -> None:
    sampler = GlobalBatchSampler(20, 4, seed=1)
    served = [sampler.batch_at(0, 0), sampler.batch_at(0, 4)]
    other = GlobalBatchSampler(20, 5, seed=1)
    other.load_state_dict({**sampler.state_dict(), "cursor": 8})
    assert sorted(np.concatenate([*served, *other]).tolist()) == list(range(20))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no rows"):
        GlobalBatchSampler(0, 4)
    with pytest.raises(ValueError, match="global_batch_size must be at least 1, got 0"):
        GlobalBatchSampler(5, 0)
    with pytest.raises(ValueError, match="drop_last"):
        GlobalBatchSampler(3, 4, drop_last=True)
    with pytest.raises(ValueError, match=r"seed=1.*has 0"):
        GlobalBatchSampler(5, 2).load_state_dict(GlobalBatchSampler(5, 2, seed=1).state_dict())
    with pytest.raises(ValueError, match=r"num_rows=6.*has 5"):
        GlobalBatchSampler(5, 2).load_state_dict(GlobalBatchSampler(6, 2).state_dict())
