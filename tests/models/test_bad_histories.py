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
