"""MTGR against an independent dense form of the paper's equations, and the laws that its batches obey."""

import pytest
import torch
from grzoo.models import AutoModelForRanking, MTGRConfig, MTGRForRanking
from torch.nn import functional as F

HISTORIES, CANDIDATES = [5, 1, 0, 9, 20, 0], [3, 1, 2, 0, 7, 0]


@pytest.fixture
def mtgr(ranking_model):
    def build(**fields):
        return ranking_model(MTGRForRanking, MTGRConfig, **{"num_attention_heads": 2, **fields})

    return build


def paper_logits(model, batch, user):
    """Logits of one user's candidates, straight from the equations of arXiv 2505.18654, token by token."""
    config, weights = model.config, {name: p.detach() for name, p in model.named_parameters()}
    e, c = (batch[name].tolist()[user : user + 2] for name in ("cu_seq_lens_q", "cu_seq_lens_candidates"))
    events, exposed = slice(*e), slice(*c)

    def row(feature, ids):
        return model.embeddings({feature: ids}, insert=False)[feature].detach().to(weights["head.towers.0.0.weight"])

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def mlp(name, *parts):
        return linear(f"{name}.2", F.silu(linear(f"{name}.0", torch.cat(parts, -1))))

    def flags(bits):
        return linear("model.features.flag_proj", torch.stack([(bits >> i) & 1 for i in range(4)], -1).to(dtype))

    dtype = weights["head.towers.0.0.weight"].dtype
    profile = [
        linear("model.features.user_proj", row(f"user_{n}", batch["user_features"][user : user + 1, p]))
        for p, n in enumerate(config.user_features)
    ]
    items = row("input_ids", batch["input_ids"][0, events])
    actions = row("event_action", batch["event_features"][0, events, 0])
    history = mlp("model.features.event_mlp", items, actions, flags(batch["item_features"][0, events, 0]))
    candidates = mlp(
        "model.features.candidate_mlp",
        row("candidate_ids", batch["candidate_ids"][0, exposed]),
        flags(batch["candidate_features"][0, exposed, 0]),
        batch["cross_features"][0, exposed].to(dtype),
    )
    x = torch.cat([*profile, history, candidates])
    h, k = len(history), len(candidates)
    recent = [i >= h - int(batch["num_recent"][user]) for i in range(h)]
    group = [0, 0, *(2 if r else 1 for r in recent), *[3] * k]
    time = [0, 0, *batch["timestamps"][0, events].tolist(), *batch["candidate_timestamps"][0, exposed].tolist()]
    n = len(group)
    mask = torch.zeros(n, n, dtype=dtype)
    for i in range(n):
        for j in range(n):
            static_sees = group[j] <= 1
            dynamic = group[i] >= 2 and group[j] == 2 and time[j] < time[i]
            mask[i, j] = i == j or static_sees or dynamic
    g = torch.tensor(group)
    heads, d = config.num_attention_heads, config.hidden_size
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."

        def norm(which, x, name=name):
            return (
                F.layer_norm(x, (d,), eps=1e-6) * weights[f"{name}{which}.weight"][g]
                + weights[f"{name}{which}.bias"][g]
            )

        q, key, v, u = linear(name + "qkvu_proj", norm("input_norm", x)).chunk(4, -1)
        q, key, v = (t.view(n, heads, -1).transpose(0, 1) for t in (q, key, v))
        a = F.silu(q @ key.mT) * mask / mask.sum(1, keepdim=True)
        out = (a @ v).transpose(0, 1).reshape(n, d)
        x = linear(name + "o_proj", norm("output_norm", out * u)) + x
    return torch.cat([mlp(f"head.towers.{t}", x[n - k :]) for t in range(len(config.tasks))], -1)


@pytest.mark.parametrize("attn_implementation", ["auto", "naive"])
def test_equals_the_papers_equations(attn_implementation, mtgr, ranking):
    model = mtgr(dtype=torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p) * 0.3)
    model.set_attn_implementation(attn_implementation)
    batch = ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    ranking.ranking_step(model, [batch])  # inserts the rows
    got = model.eval()(**batch).logits[0]
    want = torch.cat([paper_logits(model, batch, user) for user in range(len(HISTORIES))])
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_padded_equals_packed(left, mtgr, ranking):
    model, batch = mtgr(), ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    padded = ranking.pad_ranking(batch, left=left)
    ranking.assert_same_step(ranking.ranking_step(model, [padded]), ranking.ranking_step(model, [batch]))
    mask = padded["candidate_mask"].bool()
    model.eval()
    packed_logits, padded_logits = model(**batch).logits, model(**padded).logits
    assert padded_logits.shape == (*mask.shape, 2) and not padded_logits[~mask].any()
    torch.testing.assert_close(padded_logits[mask], packed_logits[0])


@pytest.mark.parametrize("split", [[[0, 1, 2], [3, 4, 5]], [[4], [0, 2], [], [5, 3, 1]]])
def test_micro_batches_do_not_change_the_step(split, mtgr, ranking):
    """Law 1: loss and gradients of a step, with dropout and a denominator per task, for any micro-batches."""
    model, batch = mtgr(), ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    parts = [ranking.take_ranking_users(batch, users) for users in split]
    ranking.assert_same_step(ranking.ranking_step(model, parts), ranking.ranking_step(model, [batch]))


@pytest.mark.parametrize("fields", [{}, {"use_dynamic_mask": False}, {"use_group_norm": False}])
def test_k_candidates_in_one_pass_equal_k_passes(fields, mtgr, ranking):
    model = mtgr(**fields)
    batch = ranking.make_ranking_batch([12], [6])
    if fields.get("use_dynamic_mask") is False:
        batch["candidate_timestamps"][:] = 20  # this mask takes the first candidate's time for all
    ranking.ranking_step(model, [batch])
    model.eval()
    together = model(**batch).logits[0]
    for k in range(6):
        one = {
            name: x[:, k : k + 1] if name.startswith(("candidate", "cross", "label")) else x
            for name, x in batch.items()
        }
        one["cu_seq_lens_candidates"] = torch.tensor([0, 1])
        torch.testing.assert_close(model(**one).logits[0, 0], together[k], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dynamic", [True, False])
def test_no_candidate_sees_its_future(dynamic, mtgr, ranking):
    """Events at or after a candidate's time never reach its logit."""
    model = mtgr(use_dynamic_mask=dynamic, dtype=torch.float64).eval()
    batch = ranking.make_ranking_batch([12], [5])
    batch["candidate_timestamps"].clamp_(min=27)
    rows = model.embeddings({name: ids for name, ids in model.embedding_ids(batch).items()}, insert=False)
    rows = {name: torch.randn_like(x, dtype=torch.float64, requires_grad=True) for name, x in rows.items()}
    logits = model(**batch, embeddings=rows).logits[0]
    seen_any = False
    for k, time in enumerate(batch["candidate_timestamps"][0]):
        (grad,) = torch.autograd.grad(logits[k].sum(), rows["input_ids"], retain_graph=True)
        reached = grad.abs().sum(1) > 0
        assert not reached[batch["timestamps"][0] >= time].any()
        if dynamic:
            assert torch.equal(reached, batch["timestamps"][0] < time)
        seen_any |= bool(reached[-4:].any())
    assert seen_any


@pytest.mark.parametrize("fields", [{}, {"use_dynamic_mask": False}, {"use_group_norm": False}])
def test_what_happens_later_changes_no_score(fields, mtgr, ranking):
    """A score is that of a pass whose history ends before the candidates, for any number of later events."""
    model = mtgr(**fields)
    batch, later = ranking.make_ranking_batch([12, 0, 3], [4, 2, 3]), 17
    batch["candidate_timestamps"].clamp_(max=29)
    ranking.ranking_step(model, [batch])
    model.eval()
    model.config.max_sequence_length = 12 + later
    longer, ends = dict(batch), batch["cu_seq_lens_q"].tolist()
    for name in ("input_ids", "timestamps", "event_features", "item_features", "token_keys"):
        parts = []
        for a, b in zip(ends, ends[1:], strict=False):
            extra = torch.full_like(batch[name][:, :1], 1).repeat_interleave(later, 1)
            parts += [batch[name][:, a:b], extra + 28 if name == "timestamps" else extra]
        longer[name] = torch.cat(parts, 1)
    longer["cu_seq_lens_q"] = batch["cu_seq_lens_q"] + later * torch.arange(4).int()
    longer["num_recent"] = batch["num_recent"] + later
    torch.testing.assert_close(model(**longer).logits, model(**batch).logits, atol=1e-6, rtol=1e-5)


def test_published_flops():
    """5.47, 18.59 and 55.76 GFLOPs at 500 tokens."""
    sizes = {"small": 5.47, "medium": 18.59, "large": 55.76}
    for name, gflops in sizes.items():
        assert round(float(getattr(MTGRConfig, name)().flops([500])[0]) / 1e9, 2) == gflops
    config = MTGRConfig(hidden_size=4, num_hidden_layers=2, num_attention_heads=1)
    by_hand = 2 * (2 * 3 * 4 * (4 * 4) + 2 * 3 * 3 * 4 + 2 * 3 * 3 * 4 + 2 * 3 * 4 * 4)  # qkvu, scores, sum, output
    assert config.flops([3, 0]).tolist() == [by_hand, 0]


def test_gradient_checkpointing_changes_nothing(mtgr, ranking):
    model, batch = mtgr(), ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    want = ranking.ranking_step(model, [batch])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ranking.assert_same_step(ranking.ranking_step(model, [batch]), want, atol=0)


@pytest.mark.parametrize("users", [0, 3])
def test_empty_micro_batch_reaches_every_parameter(users, mtgr, ranking):
    """ZeRO counts on a gradient for every parameter in every backward pass."""
    model = mtgr()
    ranking.ranking_step(model, [ranking.make_ranking_batch([3], [2])])
    model.zero_grad()
    loss = model(**ranking.make_ranking_batch([0] * users, [0] * users), num_items_in_batch=[3, 3]).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_save_and_load(mtgr, ranking, tmp_path):
    model, batch = mtgr(), ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    ranking.ranking_step(model, [batch])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForRanking.from_pretrained(tmp_path)
    assert type(loaded) is MTGRForRanking and loaded.config.to_diff_dict() == model.config.to_diff_dict()
    given = {name: x for name, x in batch.items() if not name.startswith("label")}
    scores = loaded.score(**given)
    assert torch.equal(scores, model.score(**given))
    assert scores.shape == (1, sum(CANDIDATES), 2) and (scores > 0).all() and (scores < 1).all()


def test_state_dict_keys_are_a_contract(mtgr):
    layer = ["input_norm", "output_norm", "qkvu_proj", "o_proj"]
    modules = [f"model.layers.{i}.{name}" for i in (0, 1) for name in layer]
    modules += [f"model.features.{name}" for name in ("user_proj", "event_mlp.0", "event_mlp.2")]
    modules += [f"model.features.candidate_mlp.{i}" for i in (0, 2)]
    modules += [f"head.towers.{t}.{i}" for t in (0, 1) for i in (0, 2)]
    want = [f"{name}.{part}" for name in modules for part in ("weight", "bias")] + ["model.features.flag_proj.weight"]
    assert sorted(mtgr().state_dict()) == sorted(want)


def test_learns_on_one_core(mtgr, ranking):
    """Labels that follow the candidate's item: the loss falls well below that of the base rate."""
    model = mtgr(hidden_dropout=0.0, tasks=["like"])
    batch = ranking.make_ranking_batch([6] * 20, [5] * 20)
    batch["labels"], batch["label_mask"] = (batch["candidate_ids"] > 0).float().unsqueeze(-1), None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_bf16_is_close(mtgr, ranking):
    batch = ranking.make_ranking_batch(HISTORIES, CANDIDATES)
    want, got = (ranking.ranking_step(mtgr(dtype=dtype), [batch]) for dtype in (torch.float32, torch.bfloat16))
    assert abs(got[0] - want[0]) < 0.05 * want[0]


class TestConfig:
    def test_impossible_values(self):
        from huggingface_hub.errors import StrictDataclassClassValidationError as Error

        for fields, message in [
            ({"hidden_size": 10, "num_attention_heads": 3}, "not a multiple"),
            ({"num_hidden_layers": 0}, "num_hidden_layers must be positive"),
            ({"item_features": {"genres": 64}}, "one int64 holds 1 to 63"),
            ({"tasks": ["a", "a"]}, "a name twice"),
        ]:
            with pytest.raises(Error, match=message):
                MTGRConfig(**fields)
