"""DLRM-HSTU against the STU layer written out, and the laws of its batches."""

import math

import pytest
import torch
from grzoo.models import AutoModelForRanking, DLRMHSTUConfig, DLRMHSTUForRanking
from grzoo.models.dlrm_hstu.modeling_dlrm_hstu import STULayer
from grzoo.models.ops.silu_attention import Visibility
from grzoo.models.packing import JaggedLayout
from torch.nn import functional as F

HISTORIES, CANDIDATES = [5, 1, 0, 9, 20, 0], [3, 1, 2, 0, 7, 0]


@pytest.fixture
def hstu(ranking_model):
    sizes = {"attention_head_dim": 3, "linear_head_dim": 4, "max_position_embeddings": 22}
    return lambda **fields: ranking_model(DLRMHSTUForRanking, DLRMHSTUConfig, **{**sizes, **fields})


def test_layer_by_hand():
    torch.manual_seed(0)
    config = DLRMHSTUConfig(hidden_size=6, attention_head_dim=3, linear_head_dim=4, num_attention_heads=2)
    config._attn_implementation = "auto"
    layer = STULayer(config, 0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x, places = torch.randn(5, 6, dtype=torch.float64), torch.arange(5)
    layout = JaggedLayout.from_cu_seq_lens(torch.tensor([0, 5]), 5)
    got = layer(x, layout, Visibility(places, places), torch.full((5,), 7.0), None)
    w = dict(layer.named_parameters())
    normed = F.layer_norm(x, (6,), w["input_norm.weight"], w["input_norm.bias"], 1e-6)
    u, v, q, k = (normed @ w["uvqk_proj.weight"].T + w["uvqk_proj.bias"]).split([8, 8, 6, 6], -1)
    q, k, v = (t.view(5, 2, -1).transpose(0, 1) for t in (q, k, v))
    a = (F.silu(q @ k.mT / math.sqrt(3)) * torch.ones(5, 5).tril() / 7 @ v).transpose(0, 1).reshape(5, 8)
    u = F.silu(u)
    out = torch.cat([u, a, u * F.layer_norm(a, (8,), w["output_norm.weight"], w["output_norm.bias"], 1e-6)], -1)
    torch.testing.assert_close(got, x + out @ w["o_proj.weight"].T)


@pytest.mark.parametrize("max_attn_len", [None, 3])
def test_candidates_see_the_past_within_reach(max_attn_len, hstu, ranking):
    model = hstu(dtype=torch.float64, max_attn_len=max_attn_len, num_hidden_layers=1).eval()
    batch = ranking.make_ranking_batch([12], [5])
    rows = model.embeddings(model.embedding_ids(batch), insert=False)
    rows = {name: torch.randn_like(x, dtype=torch.float64, requires_grad=True) for name, x in rows.items()}
    logits = model(**batch, embeddings=rows).logits[0]
    for k, time in enumerate(batch["candidate_timestamps"][0]):
        item, user, other = torch.autograd.grad(
            logits[k].sum(), [rows["input_ids"], rows["user_age"], rows["candidate_ids"]], retain_graph=True
        )
        seen = batch["timestamps"][0] < time
        if max_attn_len is not None:
            seen &= torch.arange(12) >= int(seen.sum()) - max_attn_len
        assert torch.equal(item.abs().sum(1) > 0, seen)
        assert user.abs().sum() > 0
        assert (other.abs().sum(1) > 0).nonzero().flatten().tolist() == [k]


def test_positions_and_times_of_the_tokens_by_hand(hstu, ranking):
    """A candidate stands after the events before it; times count from the event before, within the own history."""
    model = hstu(time_bucket_seconds=1, num_time_buckets=5).eval()
    batch = ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    users = {"timestamps": HISTORIES, "candidate_timestamps": CANDIDATES}
    for name, counts in users.items():  # each user later than the one before, whose times must not enter
        batch[name] += 1000 * torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    features, entered = [], []
    model.model.features.register_forward_hook(lambda module, given, tokens: features.extend(tokens))
    model.model.layers[0].register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    model(**batch, embeddings=model.embeddings(model.embedding_ids(batch), insert=True))
    (profile, events, candidates), want = features, []

    def token(x, position, gap):
        tables = model.model.position_embedding.weight[position], model.model.time_embedding.weight
        return x * math.sqrt(8) + tables[0] + tables[1][min(4, int(math.sqrt(gap)))]

    for user in range(len(HISTORIES)):
        times, moments = (x.tolist() for x in (_of(user, batch["timestamps"], HISTORIES),
                                               _of(user, batch["candidate_timestamps"], CANDIDATES)))  # fmt: skip
        want += profile[2 * user : 2 * user + 2]
        for place, x in enumerate(_of(user, events[None], HISTORIES)):
            want.append(token(x, place, times[place] - times[place - 1] if place else 0))
        for moment, x in zip(moments, _of(user, candidates[None], CANDIDATES), strict=True):
            past = [time for time in times if time < moment]
            want.append(token(x, len(past), moment - past[-1] if past else 0))
    torch.testing.assert_close(entered[0], torch.stack(want))


def _of(user, packed, counts):
    """What is user's of [1, tokens, ...]."""
    first = sum(counts[:user])
    return packed[0, first : first + counts[user]]


@pytest.mark.parametrize("left", [False, True])
def test_padded_equals_packed(left, hstu, ranking):
    model, batch = hstu(), ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    padded = ranking.pad_ranking(batch, left=left)
    ranking.assert_same_step(ranking.ranking_step(model, [padded]), ranking.ranking_step(model, [batch]))


def test_micro_batches_do_not_change_the_step(hstu, ranking):
    """Law 1."""
    model, batch = hstu(), ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    parts = [ranking.take_ranking_users(batch, users) for users in ([4], [0, 2], [], [5, 3, 1])]
    ranking.assert_same_step(ranking.ranking_step(model, parts), ranking.ranking_step(model, [batch]), atol=2e-6)


def test_save_and_load(hstu, ranking, tmp_path):
    model, batch = hstu(), ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    ranking.ranking_step(model, [batch])
    model.save_pretrained(tmp_path)
    given = {name: x for name, x in batch.items() if not name.startswith("label")}
    assert torch.equal(AutoModelForRanking.from_pretrained(tmp_path).score(**given), model.score(**given))


def test_impossible_lengths():
    from huggingface_hub.errors import StrictDataclassClassValidationError as Error

    with pytest.raises(Error, match="must be above"):
        DLRMHSTUConfig(max_position_embeddings=200, max_sequence_length=200)
    with pytest.raises(Error, match="max_attn_len must be at least 1"):
        DLRMHSTUConfig(max_attn_len=0)
