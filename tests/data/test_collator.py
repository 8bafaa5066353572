"""Micro-batches against a slow reference; law 1: any split of a global batch holds the same tokens and negatives."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from grzoo.data import EvalCollator, EventDataset, EveryTarget, GenRecCollator, SharedNegatives, UniformNegatives
from grzoo.data.keyed import SITE_NEGATIVE, fold, keyed

LENGTHS = [7, 1, 3, 12, 2, 5]
TARGETS = [1, 1, 2, 1, 5, 3]


def reference(lengths: list[int], targets: list[int], rows: list[int], max_length: int, seed: int, step: int) -> Any:
    """The token fields as lists, one token after the other, of the rows of the fixture `split`."""
    fields: dict[str, list[int]] = {name: [] for name in ("input_ids", "position_ids", "labels", "label_mask", "keys")}
    users, cumulative = [], [0]
    for row in rows:
        begin = max(0, lengths[row] - max_length - 1)
        if lengths[row] <= max(targets[row], begin + 1):
            continue
        for event in range(begin, lengths[row] - 1):
            fields["input_ids"].append(1000 * row + event)
            fields["position_ids"].append(event - begin)
            fields["labels"].append(1000 * row + event + 1)
            fields["label_mask"].append(event + 1 >= targets[row])
            fields["keys"].append(int(keyed(seed, step, row, event).astype(np.int64)))
        users.append(row)
        cumulative.append(len(fields["input_ids"]))
    return fields, users, cumulative


@pytest.mark.parametrize("max_length", [1, 4, 50])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [3, 0], [1], []])
def test_micro_batch_equals_the_reference(split: Callable[..., EventDataset], rows: list[int], max_length: int) -> None:
    collator = GenRecCollator(split(LENGTHS, TARGETS), max_length=max_length, seed=3)
    batch = collator(rows, step=9)
    fields, users, cumulative = reference(LENGTHS, TARGETS, rows, max_length, 3, 9)
    for name in ("input_ids", "position_ids", "labels"):
        assert batch[name].dtype == torch.int64 and batch[name].tolist() == [fields[name]]
    assert batch["label_mask"].dtype == torch.bool and batch["label_mask"].tolist() == [fields["label_mask"]]
    assert batch["token_keys"].tolist() == [fields["keys"]]
    assert batch["timestamps"].tolist() == [[10 * item for item in fields["input_ids"]]]
    assert batch["target_timestamps"].tolist() == [[10 * item for item in fields["labels"]]]
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["cu_seq_lens_q"].tolist() == cumulative
    assert batch["user_ids"].dtype == torch.int64 and batch["user_ids"].tolist() == users
    assert batch["max_length_q"] == max([0, *np.diff(cumulative).tolist()])
    assert "negative_ids" not in batch


def test_no_timestamps_no_time_fields() -> None:
    batch = GenRecCollator(EventDataset.from_arrays({"item_id": [1, 2, 3]}, [3]), max_length=4)([0])
    assert not {"timestamps", "target_timestamps"} & set(batch)


def test_further_features_stand_beside_the_inputs() -> None:
    dataset = EventDataset.from_arrays({"item_id": [1, 2, 3], "rating": np.array([5, 4, 3], np.float32)}, [3])
    batch = GenRecCollator(dataset, max_length=1, features=["rating"])([0])
    assert batch["rating"].dtype == torch.float32 and batch["rating"].tolist() == [[4.0]]
    with pytest.raises(ValueError, match=r"no features \['price'\]; they have \['item_id', 'rating'\]"):
        GenRecCollator(dataset, max_length=1, features=["price"])


def tokens_of(batches: list[Any], names: list[str]) -> list[tuple[Any, ...]]:
    """All tokens of some micro-batches, sorted by their key."""
    tokens: list[tuple[Any, ...]] = []
    for batch in batches:
        tokens += zip(*(batch[name][0].tolist() for name in ["token_keys", *names]), strict=True)
    return sorted(tokens)


@pytest.mark.parametrize("kind", ["uniform", "shared"])
def test_any_split_of_a_global_batch_holds_the_same_tokens(split: Callable[..., EventDataset], kind: str) -> None:
    dataset = split(LENGTHS, TARGETS)
    ids = np.arange(6000)
    negatives = UniformNegatives(ids, 5) if kind == "uniform" else SharedNegatives(ids, ids + 1, 5)
    names = ["input_ids", "position_ids", "labels", "label_mask", "timestamps"]
    names += ["negative_ids"] if kind == "uniform" else ["label_log_q"]
    collator = GenRecCollator(dataset, max_length=4, seed=1, negatives=negatives)
    samples = collator.samples([5, 3, 0, 2, 4])
    shared = collator.draw_shared(samples, 7)
    whole = collator.micro_batch(samples, 7, shared)
    for cuts in ([[0], [1, 2, 3]], [[3, 1], [], [2], [0]]):
        parts = [collator.micro_batch(samples[np.array(cut, dtype=int)], 7, shared) for cut in cuts]
        assert tokens_of(parts, names) == tokens_of([whole], names)
        if kind == "shared":
            assert all(torch.equal(part["negative_ids"], whole["negative_ids"]) for part in parts)


def test_uniform_negatives_are_keyed_by_token(split: Callable[..., EventDataset]) -> None:
    ids = np.arange(50) * 7
    batch = GenRecCollator(split([4]), max_length=9, seed=2, negatives=UniformNegatives(ids, 3))([0], step=5)
    assert batch["negative_ids"].shape == (1, 3, 3)
    bits = [int(fold(fold(keyed(2, 5, 0, 1), SITE_NEGATIVE), k)) for k in range(3)]
    assert batch["negative_ids"][0, 1].tolist() == [int(ids[(word * 50) >> 64]) for word in bits]


def test_shared_negatives_carry_their_log_q(split: Callable[..., EventDataset]) -> None:
    ids, counts = np.arange(6), np.array([1, 2, 3, 4, 5, 5])
    batch = GenRecCollator(split([6]), max_length=9, negatives=SharedNegatives(ids, counts, 8))([0])
    assert batch["negative_ids"].shape == batch["negative_log_q"].shape == (8,)
    assert torch.allclose(batch["negative_log_q"].exp(), torch.from_numpy(counts / 20).float()[batch["negative_ids"]])
    assert torch.allclose(batch["label_log_q"].exp(), torch.from_numpy(counts / 20).float()[batch["labels"]])


def test_steps_and_seeds_change_the_keys(split: Callable[..., EventDataset]) -> None:
    keys = [
        GenRecCollator(split([5]), max_length=9, seed=s)([0], step=t)["token_keys"] for s, t in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(key[0].tolist()) for key in keys}) == 3


def test_evaluation_gives_the_whole_history_as_seen(split: Callable[..., EventDataset]) -> None:
    batch = EvalCollator(split([8, 3], [7, 2]), max_length=2, windows=EveryTarget)([0, 1])
    assert batch["labels"][batch["label_mask"]].tolist() == [7, 1002]
    assert batch["input_ids"].tolist() == [[5, 6, 1000, 1001]]
    assert batch["cu_seen"].dtype == torch.int64 and batch["cu_seen"].tolist() == [0, 7, 9]
    assert batch["seen_item_ids"].tolist() == [0, 1, 2, 3, 4, 5, 6, 1000, 1001]
    assert batch["label_index"].tolist() == [[6, 7, 1, 2]]


def test_evaluation_of_several_targets_says_what_precedes_each(split: Callable[..., EventDataset]) -> None:
    batch = EvalCollator(split([6], [3]), max_length=10, windows=EveryTarget)([0])
    index = batch["label_index"][batch["label_mask"]]
    assert index.tolist() == [3, 4, 5]
    for position, label in zip(index.tolist(), batch["labels"][batch["label_mask"]].tolist(), strict=True):
        seen = batch["seen_item_ids"][:position].tolist()
        assert label not in seen and len(seen) == position
