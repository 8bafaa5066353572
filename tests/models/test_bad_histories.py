"""Histories that retrieval models refuse, naming the remedy, or document: HSTU and SASRec."""

import pytest
import torch


@pytest.fixture(params=["hstu", "sasrec"])
def model(request, micro_model, micro_sasrec):
    model = (micro_model if request.param == "hstu" else micro_sasrec)()
    model.embeddings({"input_ids": torch.arange(8)}, insert=True)
    return model


def history(*counts, **changes):
    """A packed micro-batch of users with so many events each."""
    total = sum(counts)
    fields = {
        "input_ids": torch.arange(total)[None] % 8,
        "timestamps": 100 + 10 * torch.arange(total)[None],
        "cu_seq_lens_q": torch.tensor([0, *counts]).cumsum(0).int(),
    }
    return fields | changes


def test_an_empty_history_is_named(model):
    with pytest.raises(ValueError, match="history of user 1 of this batch is empty.*popular items"):
        model.recommend(**history(3, 0, 2), top_k=2)


def test_a_history_longer_than_the_model_is_refused_in_training_and_cut_in_use(model):
    with pytest.raises(ValueError, match="30 events, but max_"):
        model(**history(30))
    last = {name: x[:, 10:] if x.dim() > 1 else torch.tensor([0, 20]) for name, x in history(30).items()}
    torch.testing.assert_close(model.encode(**history(30)), model.encode(**last))


def test_unknown_ids_are_read_and_not_inserted(model):
    before = model.embeddings.num_rows()
    found = model.encode(**history(5, input_ids=torch.arange(5)[None] + 10**15))
    assert found.isfinite().all() and model.embeddings.num_rows() == before


def test_times_of_a_time_bias(micro_model):
    model = micro_model()
    for at, value, message in [(0, -5, "timestamp -5 is negative"), (6, 10**6, "timestamps fall after event 6")]:
        wrong = history(5, 3)
        wrong["timestamps"][0, at] = value
        with pytest.raises(ValueError, match=message):
            model(**wrong)
    wrong = history(5, 3)
    del wrong["timestamps"]
    with pytest.raises(ValueError, match="timestamps are missing.*use_time_bias"):
        model(**wrong)
    model(**history(5, 3, timestamps=torch.tensor([[6, 7, 8, 8, 10, 1, 2, 3]])))  # falls from one user to the next


@pytest.mark.parametrize("name", ["position_ids", "token_keys", "label_mask", "labels"])
def test_fields_shorter_than_the_history_are_refused(name, model):
    """A short label mask trained the first tokens alone, short keys were read beyond their end."""
    short = torch.ones(1, 1, dtype=torch.bool if name == "label_mask" else torch.long)
    with pytest.raises(ValueError, match=rf"{name} has shape \(1, 1\), but input_ids \(1, 8\)"):
        model(**history(5, 3, **{name: short}))


def test_several_rows_are_not_packed(model):
    fields = history(5)
    twice = {name: x.repeat(2, 1) if x.dim() == 2 else x for name, x in fields.items()}
    with pytest.raises(ValueError, match=r"Packed input_ids must have shape \[1, T\]; got \(2, 5\)"):
        model(**twice)
    with pytest.raises(ValueError, match=r"got \(2, 5\)"):
        model.recommend(**twice, top_k=1)


@pytest.mark.parametrize("name", ["timestamps", "target_timestamps"])
def test_times_shorter_or_longer_than_the_history_are_refused(name, micro_model):
    for length in (1, 9):
        with pytest.raises(ValueError, match=rf"{name} has shape \(1, {length}\), but input_ids \(1, 8\)"):
            micro_model()(**history(5, 3, **{name: torch.ones(1, length, dtype=torch.long)}))


def test_times_of_what_comes_next(micro_model):
    model = micro_model()
    with pytest.raises(ValueError, match="time after event 2 of the batch is 7, before the event itself at 120"):
        model(**history(3, target_timestamps=torch.tensor([[110, 120, 7]])))
    for request in (-5, 119):
        with pytest.raises(ValueError, match=rf"time after event 2 of the batch is {request}.*request_timestamps"):
            model.encode(**history(3), request_timestamps=torch.tensor([request]))
    model.encode(**history(3), request_timestamps=torch.tensor([120]))
    seconds = history(3)["timestamps"]
    with pytest.raises(ValueError, match="timestamps must be whole seconds, int64; got torch.float32"):
        model(**history(3, timestamps=seconds.float()))
    padded = torch.tensor([[5, 6, 7, 0]])  # what stands at padded places is not looked at
    junk = torch.tensor([[100, 110, 120, -9]])
    model.encode(padded, torch.tensor([[1, 1, 1, 0]]), timestamps=junk, target_timestamps=junk)


@pytest.mark.parametrize("number", [0, -3, torch.tensor(0)], ids=str)
def test_a_loss_is_not_divided_by_nothing(number, model, batches):
    """0 / 0 is NaN, which an optimizer spreads over all weights."""
    batch = batches.make_batch([3, 2], trained=0.0)
    with pytest.raises(ValueError, match=r"num_items_in_batch must be at least 1, got .*give 1 for a step without any"):
        model(**batch, num_items_in_batch=number)
    assert model(**batch, num_items_in_batch=1).loss.item() == 0
