"""Negatives are keyed by what they belong to; compared with draws one by one on Python integers."""

import numpy as np
import pytest
from grzoo.data import AllItems, EventDataset, GenRecCollator, RecentFirst, SharedNegatives, UniformNegatives
from grzoo.data.keyed import SITE_NEGATIVE, SITE_SHARED_NEGATIVE, fold, keyed
from grzoo.data.negatives import ItemLogQ
from grzoo.data.windows import trained_positions

IDS = np.array([7, -3, 2**40, 11, 5])


@pytest.mark.parametrize("tokens", [0, 1, 3, 5000])
def test_uniform_negatives_equal_single_draws(tokens: int) -> None:
    keys = fold(3, np.arange(tokens))
    drawn = UniformNegatives(IDS, 9).draw(keys)
    assert drawn.shape == (tokens, 9)
    for token in range(0, tokens, 701):
        expected = [IDS[(int(fold(fold(keys[token], SITE_NEGATIVE), k)) * len(IDS)) >> 64] for k in range(9)]
        assert drawn[token].tolist() == expected


def test_uniform_negatives_are_uniform_over_the_catalogue() -> None:
    drawn = UniformNegatives(IDS, 16).draw(fold(0, np.arange(5000)))
    shares = np.array([(drawn == item).mean() for item in IDS])
    assert np.abs(shares - 0.2).max() < 0.01


def test_shared_negatives_are_labels_of_drawn_positions() -> None:
    lengths = np.array([5, 1, 9, 3])
    dataset = EventDataset.from_arrays({"item_id": np.arange(18) * 100}, lengths, [1, 1, 6, 1])
    windows = RecentFirst(dataset, 4)
    samples = windows.select([2, 0, 1, 3])
    owner, event = trained_positions(samples)
    starts = np.cumsum(lengths) - lengths
    labels = (starts[samples.rows[owner]] + event) * 100
    drawn = SharedNegatives(np.arange(18) * 100, np.ones(18), 50).draw(windows, samples, seed=3, step=8)
    bits = [int(fold(keyed(3, SITE_SHARED_NEGATIVE, 8), k)) for k in range(50)]
    assert drawn.tolist() == [labels[(word * len(labels)) >> 64] for word in bits]
    assert set(drawn.tolist()) <= set(labels.tolist())


def test_shared_negatives_of_a_batch_without_targets_are_none() -> None:
    windows = RecentFirst(EventDataset.from_arrays({"item_id": [4]}, [1]), 4)
    negatives = SharedNegatives([4], [1], 8)
    assert negatives.draw(windows, windows.select([0]), 0, 0).shape == (0,)
    assert negatives.draw(windows, windows.select([]), 0, 0).shape == (0,)


def test_log_q_is_the_share_of_train_events() -> None:
    log_q = ItemLogQ([30, 10, 20], [6, 3, 0])
    assert np.allclose(np.exp(log_q(np.array([[10, 20], [30, 99]]))), [[0.3, 0.1], [0.6, 0.1]])
    assert log_q([10]).dtype == np.float32


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_negatives must be at least 1, got 0"):
        UniformNegatives(IDS, 0)
    with pytest.raises(ValueError, match="catalogue is empty"):
        UniformNegatives([], 4)
    with pytest.raises(ValueError, match="catalogue is empty"):
        SharedNegatives([], [], 4)


def test_all_items_are_the_catalogue_in_every_micro_batch() -> None:
    dataset = EventDataset.from_arrays({"item_id": np.arange(8)}, np.array([5, 3]), [1, 1])
    collator = GenRecCollator(dataset, max_length=4, negatives=AllItems(IDS))
    for rows in ([0], [1, 0], []):
        batch = collator(rows)
        assert batch["negative_ids"].tolist() == IDS.tolist() and "negative_log_q" not in batch
    with pytest.raises(ValueError, match="catalogue is empty"):
        AllItems([])
