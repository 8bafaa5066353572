"""Packing and unpacking: no id marks padding, every token keeps its fields."""

import pytest
import torch
from grzoo.models.packing import (
    TOKEN_FIELDS,
    JaggedLayout,
    check_times,
    keep_last,
    next_timestamps,
    pack_batch,
    packed_positions,
    unpack,
)


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
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 0, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 4, 5, 7]),
        "max_length_q": 4,
    }
    kept = keep_last(batch, 2)
    assert kept["input_ids"].tolist() == [[2, 3, 4, 5, 6]] and kept["timestamps"].tolist() == [[20, 30, 40, 50, 60]]
    assert kept["cu_seq_lens_q"].tolist() == [0, 2, 3, 5] and kept["max_length_q"] == 2
    assert kept["position_ids"].tolist() == [[0, 1, 0, 0, 1]]
    assert keep_last(batch, 4) == batch


@pytest.mark.parametrize("name", [*TOKEN_FIELDS[1:], "negative_ids"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (1, 6), (2, 5), (5,), (1, 5, 1)], ids=str)
def test_packed_fields_of_another_shape_are_refused(name, shape):
    """A field that is too short would be read beyond its end, or broadcast, without a word."""
    batch = {"input_ids": torch.zeros(1, 5, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 2, 5])}
    shape = (*shape, 3) if name == "negative_ids" and len(shape) == 2 else shape
    values = torch.zeros(shape, dtype=torch.long)
    if name == "negative_ids" and shape in [(5,), (1, 5, 1)]:  # shared ones, and one for each token
        assert pack_batch(batch | {name: values})[name] is values
        return
    with pytest.raises(ValueError, match=rf"{name} has shape \(.*\), but input_ids \(1, 5\): they must agree"):
        pack_batch(batch | {name: values})
    fits = torch.zeros((1, 5, 3) if name == "negative_ids" else (1, 5), dtype=torch.long)
    assert pack_batch(batch | {name: fits})[name] is fits


@pytest.mark.parametrize("shape", [(2, 5), (0, 5), (5,), (1, 5, 1)], ids=str)
def test_packed_ids_have_one_row(shape):
    ids = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"must have shape \[1, T\]; got .*leave cu_seq_lens_q out"):
        pack_batch({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 5])})


@pytest.mark.parametrize("starts", [torch.tensor([[0, 5]]), torch.tensor([0.0, 5.0])], ids=["2-D", "float"])
def test_starts_are_integers_in_a_row(starts):
    with pytest.raises(ValueError, match=r"must be integers \[B \+ 1\]; got"):
        JaggedLayout.from_cu_seq_lens(starts, 5)


@pytest.mark.parametrize("name", ["timestamps", "target_timestamps"])
def test_a_layout_has_one_time_per_token(name):
    with pytest.raises(ValueError, match=rf"{name} has shape \(1,\), but there are 5 tokens"):
        JaggedLayout.from_cu_seq_lens(torch.tensor([0, 5]), 5, **{name: torch.ones(1, dtype=torch.long)})


LAYOUT = JaggedLayout.from_cu_seq_lens(torch.tensor([0, 2, 2, 5]), 5)
TIMES = torch.tensor([10, 20, 1, 1, 3])


def test_good_times_pass():
    check_times(LAYOUT, TIMES)
    check_times(LAYOUT, TIMES, TIMES)  # the next event may come in the same second
    check_times(LAYOUT, TIMES.int(), next_timestamps(LAYOUT, TIMES, None).int())
    nothing = JaggedLayout.from_cu_seq_lens(torch.tensor([0, 0]), 0)
    check_times(nothing, TIMES[:0], TIMES[:0])


@pytest.mark.parametrize(
    "times, target, message",
    [
        ([10, 20, -1, 1, 3], None, "timestamp -1 is negative"),
        ([10, 9, 1, 1, 3], None, "timestamps fall after event 0"),
        ([10, 20, 1, 1, 3], [20, 21, 1, 0, 3], "time after event 3 of the batch is 0, before the event itself at 1"),
        ([10, 20, 1, 1, 3], [20, -5, 1, 1, 3], "time after event 1 of the batch is -5"),
        ([10.0, 20.0, 1.0, float("nan"), 3.0], None, "timestamps must be whole seconds.*got torch.float32"),
        ([10, 20, 1, 1, 3], [20.0, 21.0, 1.0, 1.0, 3.0], "target_timestamps must be whole seconds"),
    ],
    ids=["negative", "falls", "before", "negative target", "float", "float target"],
)
def test_bad_times_are_named(times, target, message):
    with pytest.raises(ValueError, match=message):
        check_times(LAYOUT, torch.tensor(times), None if target is None else torch.tensor(target))


def test_the_time_of_a_request_is_whole_seconds():
    with pytest.raises(ValueError, match="request_timestamps must be whole seconds"):
        next_timestamps(LAYOUT, TIMES, torch.tensor([30.0, 30.0, 30.0]))
