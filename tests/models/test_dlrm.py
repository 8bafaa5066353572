"""The DLRM-style baseline: the mean of the past, and the laws of batches."""

import pytest
import torch
from grzoo.models import AutoModelForRanking, DLRMConfig, DLRMForRanking
from grzoo.models.ranking import RankingBatch
from grzoo.models.ranking.past import events_before
from torch.nn import functional as F

HISTORIES, CANDIDATES = [5, 1, 0, 9, 20, 0], [3, 1, 2, 0, 7, 0]


@pytest.fixture
def dlrm(ranking_model):
    return lambda **fields: ranking_model(DLRMForRanking, DLRMConfig, **{"mlp_size": 12, **fields})


def test_events_before_equal_brute_force(dlrm, ranking):
    config = dlrm().config
    for histories, candidates in ((HISTORIES, CANDIDATES), ([0, 0], [2, 1]), ([], [])):
        batch = RankingBatch.from_fields(ranking.make_ranking_batch(histories, candidates), config)
        want = []
        for user in range(len(histories)):
            a, b = batch.layout.cu_seq_lens[user : user + 2].tolist()
            c, d = batch.candidates.cu_seq_lens[user : user + 2].tolist()
            want += [int((batch.timestamps[a:b] < t).sum()) for t in batch.candidate_timestamps[c:d]]
        assert events_before(batch).tolist() == want


def test_no_candidate_sees_its_future(dlrm, ranking):
    model = dlrm(dtype=torch.float64).eval()
    batch = ranking.make_ranking_batch([12], [5])
    rows = model.embeddings(model.embedding_ids(batch), insert=False)
    rows = {name: torch.randn_like(x, dtype=torch.float64, requires_grad=True) for name, x in rows.items()}
    logits = model(**batch, embeddings=rows).logits[0]
    for k, time in enumerate(batch["candidate_timestamps"][0]):
        (grad,) = torch.autograd.grad(logits[k].sum(), rows["input_ids"], retain_graph=True)
        assert torch.equal(grad.abs().sum(1) > 0, batch["timestamps"][0] < time)


def test_equals_the_equations(dlrm, ranking):
    """Candidate after candidate: the vectors beside their products, then the MLP."""
    model, fields = dlrm(dtype=torch.float64).eval(), ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    rows = model.embeddings(model.embedding_ids(fields), insert=True)
    batch = RankingBatch.from_fields(fields, model.config).without_keys()
    profile, events, candidates = model.model.features(batch, rows)
    profile, width, want = profile.view(len(HISTORIES), 2, -1), model.config.hidden_size, []
    owners = [user for user, count in enumerate(CANDIDATES) for _ in range(count)]
    for candidate, user in enumerate(owners):
        first = sum(HISTORIES[:user])
        own = range(first, first + HISTORIES[user])
        past = [events[i] for i in own if batch.timestamps[i] < batch.candidate_timestamps[candidate]]
        mean = torch.stack(past).mean(0) if past else torch.zeros(width, dtype=torch.float64)
        vectors = [*profile[user], mean, candidates[candidate]]
        pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
        products = torch.stack([vectors[i] @ vectors[j] for i, j in pairs]) / width**0.5
        hidden = torch.cat([*vectors, products])
        for layer in model.model.layers:
            hidden = F.silu(layer.weight @ hidden + layer.bias)
        want.append(hidden)
    torch.testing.assert_close(model.model(batch, rows), torch.stack(want), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_padded_equals_packed(left, dlrm, ranking):
    model, batch = dlrm(), ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    padded = ranking.pad_ranking(batch, left=left)
    ranking.assert_same_step(ranking.ranking_step(model, [padded]), ranking.ranking_step(model, [batch]))


def test_micro_batches_do_not_change_the_step(dlrm, ranking):
    """Law 1."""
    model, batch = dlrm(), ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    parts = [ranking.take_ranking_users(batch, users) for users in ([4], [0, 2], [], [5, 3, 1])]
    ranking.assert_same_step(ranking.ranking_step(model, parts), ranking.ranking_step(model, [batch]))


def test_save_and_load(dlrm, ranking, tmp_path):
    model, batch = dlrm(), ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    ranking.ranking_step(model, [batch])
    model.save_pretrained(tmp_path)
    given = {name: x for name, x in batch.items() if not name.startswith("label")}
    assert torch.equal(AutoModelForRanking.from_pretrained(tmp_path).score(**given), model.score(**given))


def test_flops_by_hand():
    config = DLRMConfig(hidden_size=4, mlp_size=5, num_mlp_layers=2, user_features=["a"])
    layers = 2 * (3 * 4 + 3) * 5 + 2 * 5 * 5  # three vectors and their three products
    assert config.flops([1, 0]).tolist() == [2 * 2 * 4 * 4 + 3 * 2 * 4 + layers, 0]
