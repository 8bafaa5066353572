"""Recommending: read only, truncated to the last events, seen items out, honest about what is missing."""

import pytest
import torch
from grzoo.models import ShardedCatalogue

ITEMS = torch.arange(30)


@pytest.fixture
def model(micro_model):
    model = micro_model()
    with torch.no_grad():
        model.embeddings({"candidate_ids": ITEMS}, insert=True)
    return model


HISTORY = torch.tensor([[3, 4, 5, 6], [9, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
TIMES = torch.tensor([[100, 200, 300, 400], [7, 8, 0, 0]])


def test_equals_brute_force_and_leaves_the_model_alone(model):
    rows, state = model.embeddings.num_rows(), torch.get_rng_state()
    best = model.recommend(HISTORY, MASK, timestamps=TIMES, top_k=5)
    assert model.training and model.embeddings.num_rows() == rows and torch.equal(state, torch.get_rng_state())
    scores = model.encode(HISTORY, MASK, timestamps=TIMES) @ model.item_embeddings(ITEMS).T
    assert not scores.requires_grad
    for user, seen in enumerate([[3, 4, 5, 6], [9, 8]]):
        scores[user, seen] = -torch.inf
    want = scores.topk(5)
    assert torch.equal(best.item_ids, ITEMS[want.indices])
    torch.testing.assert_close(best.scores, want.values)
    everything = model.recommend(HISTORY, MASK, timestamps=TIMES, top_k=30, exclude_seen=False)
    assert all(sorted(row) == ITEMS.tolist() for row in everything.item_ids.tolist())


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_scores_are_what_the_model_was_trained_on(similarity, micro_sasrec):
    """Inner products with the rows, or cosines; the queries are those of `forward`."""
    model = micro_sasrec(similarity=similarity).eval()
    rows = torch.randn(30, 6)
    model.embeddings.import_rows("items", {"ids": ITEMS, "rows": rows})
    best = model.recommend(HISTORY, MASK, top_k=30, exclude_seen=False)
    queries = model(HISTORY, MASK).query_embeddings[[0, 1], [3, 1]]
    if similarity == "cosine":
        queries, rows = torch.nn.functional.normalize(queries), torch.nn.functional.normalize(rows)
    torch.testing.assert_close(best.scores, (queries @ rows.T).gather(1, best.item_ids))


def test_candidates_and_prepared_catalogue(model):
    some = torch.tensor([3, 20, 11])
    best = model.recommend(HISTORY, MASK, timestamps=TIMES, top_k=3, candidates=some)
    assert set(best.item_ids[1].tolist()) == {3, 20, 11}
    assert best.item_ids[0, 2] == -1 and best.scores[0, 2] == -torch.inf  # item 3 was seen
    catalogue = ShardedCatalogue(model, some)
    again = model.recommend(HISTORY, MASK, timestamps=TIMES, top_k=3, candidates=catalogue)
    assert torch.equal(again.item_ids, best.item_ids)


def test_packed_equals_padded(model):
    keep = MASK.bool()
    packed = {"cu_seq_lens_q": torch.tensor([0, 4, 6]), "timestamps": TIMES[keep].unsqueeze(0)}
    got = model.recommend(HISTORY[keep].unsqueeze(0), **packed, top_k=4)
    assert torch.equal(got.item_ids, model.recommend(HISTORY, MASK, timestamps=TIMES, top_k=4).item_ids)


def test_only_the_last_events_count_but_all_are_seen(model):
    long = torch.arange(25).unsqueeze(0)  # max_sequence_length is 20
    times = long * 60
    got, want = model.encode(long, timestamps=times), model.encode(long[:, 5:], timestamps=times[:, 5:])
    torch.testing.assert_close(got, want)
    assert set(model.recommend(long, timestamps=times, top_k=5).item_ids[0].tolist()) == {25, 26, 27, 28, 29}


def test_the_time_of_the_request_matters(model):
    now, later = torch.tensor([500, 9]), torch.tensor([10**8, 10**8])
    at = [model.encode(HISTORY, MASK, timestamps=TIMES, request_timestamps=t) for t in (now, later)]
    assert not torch.allclose(*at)
    target = torch.tensor([[200, 300, 400, 500], [8, 9, 0, 0]])
    torch.testing.assert_close(model.encode(HISTORY, MASK, timestamps=TIMES, target_timestamps=target), at[0])
    last = model.encode(HISTORY, MASK, timestamps=TIMES, request_timestamps=torch.tensor([400, 8]))
    torch.testing.assert_close(model.encode(HISTORY, MASK, timestamps=TIMES), last)


def test_evaluation_batch_with_prepared_embeddings(model, batches):
    batch = batches.make_batch([3, 5])
    with model.inference():
        embeddings = model.embeddings({"input_ids": batch["input_ids"]})
        prepared = model.encode(**batch, embeddings=embeddings)
    torch.testing.assert_close(prepared, model.encode(**batch))


def test_unknown_ids_are_read_as_the_config_says(model, micro_model):
    strangers = HISTORY + 10**15
    zeros = model.encode(strangers, MASK, timestamps=TIMES)
    initial = micro_model(unknown_items="initial").encode(strangers, MASK, timestamps=TIMES)
    assert zeros.isfinite().all() and not torch.allclose(zeros, initial)


def test_impossible_requests(model):
    with pytest.raises(ValueError, match="timestamps are missing"):
        model.recommend(HISTORY, MASK)
    with pytest.raises(ValueError, match="history of user 1 of this batch is empty.*popular items"):
        model.recommend(HISTORY, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), timestamps=TIMES)
    with pytest.raises(ValueError, match="number of candidates, 30; got 31"):
        model.recommend(HISTORY, MASK, timestamps=TIMES, top_k=31)
    assert model.training


def test_a_misspelt_field_is_refused(micro_model):
    """`request_timestamp` for `request_timestamps` would otherwise give other recommendations without a word."""
    ids = torch.tensor([[3, 1, 2]])
    with pytest.raises(ValueError, match=r"does not take \['request_timestamp'\]"):
        micro_model().recommend(ids, timestamps=ids * 100, request_timestamp=torch.tensor([400]), top_k=1)


@pytest.mark.parametrize("function", ["encode", "recommend"])
def test_a_misspelt_mask_is_refused(function, model):
    """`attn_mask` for `attention_mask` would make events of the padding."""
    with pytest.raises(ValueError, match=rf"{function}\(\) does not take \['attn_mask'\]; a history has"):
        getattr(model, function)(HISTORY, timestamps=TIMES.sort(1).values, attn_mask=MASK)


def test_a_micro_batch_of_the_collator_is_taken_as_it_is(model, batches):
    batch = batches.make_batch([3, 5])
    batch["input_ids"] = batch["input_ids"] // 10**17
    seen = {"seen_item_ids": torch.arange(3), "cu_seen": torch.tensor([0, 3, 3]), "label_index": batch["labels"]}
    needed = ("input_ids", "cu_seq_lens_q", "timestamps", "target_timestamps")
    best = model.recommend(**batch, **seen, top_k=3)
    assert torch.equal(best.item_ids, model.recommend(**{name: batch[name] for name in needed}, top_k=3).item_ids)


def test_positions_count(model, micro_sasrec):
    """`position_ids` reach the backbone; those of a history that is cut go down with it."""
    for each in (model, micro_sasrec(position_alignment="start")):
        fields = {"timestamps": TIMES[:1], "cu_seq_lens_q": torch.tensor([0, 4])}
        plain = each.encode(HISTORY[:1], **fields)
        assert torch.equal(each.encode(HISTORY[:1], **fields, position_ids=torch.arange(4)[None]), plain)
        later = torch.arange(3, 7)[None]
        got = each.encode(HISTORY[:1], **fields, position_ids=later)
        with each.inference():
            want = each(HISTORY[:1], **fields, position_ids=later).query_embeddings[0, -1:]
        assert torch.equal(got, want) and not torch.allclose(got, plain)
        long = torch.arange(25)[None]
        cut = each.encode(long, timestamps=long * 60, position_ids=long)
        assert torch.equal(cut, each.encode(long, timestamps=long * 60))


def test_candidates_in_a_list(model):
    fields = {"timestamps": TIMES, "top_k": 2}
    want = model.recommend(HISTORY, MASK, candidates=torch.tensor([20, 11]), **fields)
    for some in ([20, 11], (11, 20), torch.tensor([20, 11]).numpy()):
        assert torch.equal(model.recommend(HISTORY, MASK, candidates=some, **fields).item_ids, want.item_ids)
    with pytest.raises(ValueError, match="must be integers; got torch.float32"):
        model.recommend(HISTORY, MASK, candidates=[1.5, 2.0], **fields)
    with pytest.raises(ValueError, match="number of candidates, 0; got 2"):
        model.recommend(HISTORY, MASK, candidates=[], **fields)


def test_a_config_without_return_dict(micro_model, micro_sasrec, batches):
    """The backbone then returns tuples to others, not to the model that stands on it."""
    for build in (micro_model, micro_sasrec):
        model, plain = build(return_dict=False), build()
        batch = batches.make_batch([3, 5])
        loss, query = model(**batch)
        want = plain(**batch)
        assert torch.equal(loss, want.loss) and torch.equal(query, want.query_embeddings)
        assert torch.equal(model.encode(**batch), plain.encode(**batch))
        assert isinstance(model.model(HISTORY, MASK, timestamps=TIMES), tuple)


def test_recommending_leaves_every_module_in_its_mode(model):
    model.model.layers[0].eval()  # frozen by the user
    before = [module.training for module in model.modules()]
    model.recommend(HISTORY, MASK, timestamps=TIMES, top_k=2)
    assert [module.training for module in model.modules()] == before and model.training
    with pytest.raises(RuntimeError), model.inference():
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
