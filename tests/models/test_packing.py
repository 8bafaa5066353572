"""Packing and unpacking: no id marks padding, every token keeps its fields."""

import pytest
import torch
from grzoo.models.packing import JaggedLayout, keep_last, next_timestamps, pack_batch, packed_positions, unpack


def test_any_padding_packs_alike_and_unpacks_back():
    ids = torch.tensor([[9, 0, -1, 7], [0, 0, 0, 0], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
    packed = pack_batch(
        {"input_ids": ids, "attention_mask": mask, "timestamps": ids * 10, "negative_ids": ids.unsqueeze(2)}
    )
    assert packed["input_ids"].tolist() == [[0, -1, 5, 7, 8]]
    assert packed["timestamps"].tolist() == [[0, -10, 50, 70, 80]]
    assert packed["negative_ids"].shape == (1, 5, 1)
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert packed["cu_seq_lens_q"].tolist() == [0, 2, 2, 5] and packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["max_length_q"] == 3 and "attention_mask" not in packed
    back = unpack(packed["input_ids"].unsqueeze(-1).expand(-1, -1, 2), mask)
    assert torch.equal(back[..., 1], ids * mask)


def test_without_a_mask_all_are_tokens():
    packed = pack_batch({"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": None, "labels": None})
    assert packed["cu_seq_lens_q"].tolist() == [0, 3, 6] and "labels" not in packed


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_nothing_packs_to_nothing(shape):
    packed = pack_batch({"input_ids": torch.zeros(shape, dtype=torch.long)})
    assert packed["input_ids"].shape == (1, 0) and packed["cu_seq_lens_q"].tolist() == [0] * (shape[0] + 1)


def test_packed_stays_as_it_is():
    batch = {"input_ids": torch.tensor([[1, 2]]), "cu_seq_lens_q": torch.tensor([0, 2])}
    assert pack_batch(batch) == batch
    with pytest.raises(ValueError, match="packed .* or padded .* not both"):
        pack_batch(batch | {"attention_mask": torch.ones(1, 2)})


def test_fields_of_another_shape_are_refused():
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"timestamps has shape \(2, 2\), but input_ids \(2, 3\)"):
        pack_batch({"input_ids": ids, "timestamps": ids[:, :2]})
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 2\)"):
        pack_batch({"input_ids": ids, "attention_mask": ids[:, :2]})
    with pytest.raises(ValueError, match=r"must have shape \[B, L\]; got \(3,\)"):
        pack_batch({"input_ids": ids[0]})


@pytest.mark.parametrize("starts", [[0, 2], [1, 5], [0, 4, 3, 5], []])
def test_starts_must_describe_the_tokens(starts):
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 5"):
        JaggedLayout.from_cu_seq_lens(torch.tensor(starts, dtype=torch.long), 5)


def test_positions_and_next_times():
    layout = JaggedLayout.from_cu_seq_lens(torch.tensor([0, 2, 2, 5]), 5)
    assert (layout.lengths, layout.max_length, layout.num_tokens) == ([2, 0, 3], 3, 5)
    assert packed_positions(layout).tolist() == [0, 1, 0, 1, 2]
    times = torch.tensor([10, 20, 1, 2, 3])
    assert next_timestamps(layout, times, None).tolist() == [20, 20, 2, 3, 3]
    assert next_timestamps(layout, times, torch.tensor([99, 98, 97])).tolist() == [20, 99, 2, 3, 97]
    with pytest.raises(ValueError, match=r"one time per user, \[3\]"):
        next_timestamps(layout, times, torch.tensor([1]))


def test_keep_last_keeps_the_last_events_and_restarts_positions():
    batch = {
        "input_ids": torch.arange(7).unsqueeze(0),
        "timestamps": torch.arange(7).unsqueeze(0) * 10,
        "position_ids": torch.arange(7).unsqueeze(0),
        "cu_seq_lens_q": torch.tensor([0, 4, 5, 7]),
        "max_length_q": 4,
    }
    kept = keep_last(batch, 2)
    assert kept["input_ids"].tolist() == [[2, 3, 4, 5, 6]] and kept["timestamps"].tolist() == [[20, 30, 40, 50, 60]]
    assert kept["cu_seq_lens_q"].tolist() == [0, 2, 3, 5] and kept["max_length_q"] == 2 and "position_ids" not in kept
    assert keep_last(batch, 4) == batch
