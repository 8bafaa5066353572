"""Alone and elsewhere: plain DataLoaders serve every row once over the ranks, balanced, whatever collates them."""

import numpy as np
import pytest
from grzoo.data import BalancedBatchSampler, EventDataset, GenRecCollator
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader


@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=80),
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 4),
)
def test_every_row_is_served_once_over_the_ranks(
    lengths: list[int], batch: int, world: int, number: int, epoch: int
) -> None:
    served: list[list[int]] = []
    for rank in range(world):
        sampler = BalancedBatchSampler(
            lengths, batch, world_size=world, rank=rank, micro_batches=number, drop_last=False, seed=1
        )
        sampler.set_epoch(epoch)
        lists = list(sampler)
        assert len(lists) == len(sampler) and lists == list(sampler)
        served += lists
    assert sorted(row for rows in served for row in rows) == list(range(len(lengths)))


def test_more_ranks_than_users_get_empty_lists() -> None:
    parts = [list(BalancedBatchSampler([5, 3], 2, world_size=4, rank=rank)) for rank in range(4)]
    assert sorted(len(rows) for part in parts for rows in part) == [0, 0, 1, 1]


def test_our_collator_in_a_plain_loader() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 40, 64)
    dataset = EventDataset.from_arrays({"item_id": np.arange(lengths.sum())}, lengths)
    collator = GenRecCollator(dataset, max_length=50)
    loads = []
    for rank in range(2):
        sampler = BalancedBatchSampler(lengths - 1, 32, world_size=2, rank=rank)
        batches = list(DataLoader(range(64), batch_sampler=sampler, collate_fn=collator))
        assert len(batches) == 2
        loads.append([batch["input_ids"].numel() for batch in batches])
    assert np.abs(np.subtract(*loads)).max() <= 2 and np.sum(loads) == (lengths - 1).sum()
    (whole,) = DataLoader(range(64), batch_size=64, collate_fn=collator)
    assert whole["cu_seq_lens_q"][-1] == (lengths - 1).sum()


def test_another_collator_and_data_set() -> None:
    flattening = pytest.importorskip("transformers").DataCollatorWithFlattening
    rows = [{"input_ids": list(range(n))} for n in (9, 1, 4, 6)]
    sampler = BalancedBatchSampler([len(row["input_ids"]) for row in rows], 4, micro_batches=2)
    batches = list(DataLoader(rows, batch_sampler=sampler, collate_fn=flattening()))
    assert sorted(batch["input_ids"].numel() for batch in batches) == [10, 10]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2 ranks"):
        BalancedBatchSampler([1], 1, world_size=2, rank=2)
    with pytest.raises(ValueError, match="sequence of 9 tokens exceeds the budget of 8"):
        list(BalancedBatchSampler([9], 1, max_tokens_per_device=8))
