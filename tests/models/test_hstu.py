"""HSTU against an independent dense form of the paper's equations, and the laws that its batches obey."""

import math

import pytest
import torch
from grzoo.models import HSTUForRetrieval
from grzoo.models.ops import hstu_attention_naive, keyed_dropout_naive
from grzoo.models.ops.hstu_attention import HSTU_ATTENTION_FUNCTIONS
from torch.nn import functional as F

LENGTHS = [5, 1, 0, 9, 20, 2]


def paper_loss(weights, config, item, batch):
    """Sampled-softmax loss of a padded batch, straight from the equations of arXiv 2402.17152; dense.

    weights: the state dict. item: function from ids to vectors. All is padded to n = max_position_embeddings.
    """
    n, d, heads = config.max_position_embeddings, config.hidden_size, config.num_attention_heads
    dv, dqk = config.linear_head_dim, config.attention_head_dim
    starts = batch["cu_seq_lens_q"].tolist()
    users = len(starts) - 1

    def padded(x):
        out = x.new_zeros((users, n, *x.shape[2:]))
        for u in range(users):
            out[u, : starts[u + 1] - starts[u]] = x[0, starts[u] : starts[u + 1]]
        return out

    valid = padded(torch.ones_like(batch["label_mask"]))
    keys = padded(batch["token_keys"]).flatten()

    def dropout(x, site):
        return keyed_dropout_naive(x.flatten(0, 1), config.hidden_dropout, keys, site).view(x.shape)

    x = item(padded(batch["input_ids"])) * d**0.5 + weights["model.position_embedding.weight"]
    x = dropout(x, 0) * valid.unsqueeze(-1)
    dt = padded(batch["target_timestamps"]).unsqueeze(2) - padded(batch["timestamps"]).unsqueeze(1)  # ts[i + 1] - ts[j]
    buckets = (dt.abs().clamp(min=1).double().log() / 0.301).long().clamp(0, config.num_time_buckets - 1)
    offset = torch.arange(n).unsqueeze(0) - torch.arange(n).unsqueeze(1) + n - 1
    causal = torch.ones(n, n).tril()
    for layer in range(config.num_hidden_layers):
        w = {k.rsplit(f"layers.{layer}.")[-1]: v for k, v in weights.items() if f"layers.{layer}." in k}
        uvqk = F.silu(F.layer_norm(x, (d,), eps=1e-6) @ w["uvqk_proj.weight"].T)
        u, v, q, k = torch.split(uvqk, [heads * dv, heads * dv, heads * dqk, heads * dqk], dim=-1)
        q, k, v = (t.view(users, n, heads, -1) for t in (q, k, v))
        rab = w["position_bias"][offset] + (w["time_bias"][buckets] if config.use_time_bias else 0)
        rab = rab.expand(users, n, n)
        a = F.silu(torch.einsum("bihd,bjhd->bhij", q, k) + rab.unsqueeze(1)) / n * causal
        av = torch.einsum("bhij,bjhd->bihd", a, v).reshape(users, n, heads * dv)
        y = dropout(F.layer_norm(av, (heads * dv,), eps=1e-6) * u, 1 + layer)
        x = (y @ w["o_proj.weight"].T + w["o_proj.bias"] + x) * valid.unsqueeze(-1)
    query = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    labels, mask = padded(batch["labels"]), padded(batch["label_mask"])
    if batch["negative_ids"].dim() == 3:
        negatives = padded(batch["negative_ids"])
    else:
        negatives = batch["negative_ids"].expand(users, n, -1)
    candidates = torch.cat([labels.unsqueeze(2), negatives], dim=2)
    vectors = item(candidates)
    vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    logits = torch.einsum("bnd,bncd->bnc", query, vectors) / config.temperature
    if "label_log_q" in batch:
        negative_log_q = batch["negative_log_q"].expand(users, n, -1)
        logits = logits - torch.cat([padded(batch["label_log_q"]).unsqueeze(2), negative_log_q], 2)
    hit = negatives == labels.unsqueeze(2)
    logits = torch.cat([logits[..., :1], torch.where(hit, -5e4, logits[..., 1:])], dim=2)
    return (-logits.log_softmax(-1)[..., 0] * mask).sum() / mask.sum(), query


@pytest.mark.parametrize("attn_implementation", ["auto", "eager", "naive"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_time_bias": False},
        {"negative_sampling": "shared", "num_attention_heads": 1},
        {"negative_sampling": "all"},
    ],
)
def test_equals_the_papers_equations(fields, attn_implementation, micro_model, batches):
    model = micro_model(dtype=torch.float64, **fields)
    model.set_attn_implementation(attn_implementation)
    batch = batches.make_batch(LENGTHS, sampling=fields.get("negative_sampling", "uniform"))
    loss, dense, rows = batches.by_id(model, [batch])
    known = {
        item: model.embeddings({"input_ids": torch.tensor([item])}, insert=False)["input_ids"].detach() for item in rows
    }
    table = {item: row[0].double().requires_grad_() for item, row in known.items()}
    nothing = torch.zeros(model.config.hidden_size, dtype=torch.float64)

    def item(ids):
        return torch.stack([table.get(i, nothing) for i in ids.flatten().tolist()]).view(*ids.shape, -1)

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    want, query = paper_loss(weights, model.config, item, batch)
    want.backward()
    wanted = {name: w.grad for name, w in weights.items()}
    batches.assert_same(
        (loss, dense, rows), (want.detach().float().double(), wanted, {i: r.grad.float() for i, r in table.items()})
    )
    got = model(**batch).query_embeddings[0]
    valid = torch.cat([query[u, :length] for u, length in enumerate(LENGTHS)])
    torch.testing.assert_close(got, valid.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["auto", "eager", "host", "naive", "triton"])
def test_the_named_attention_runs(name, micro_model, batches, monkeypatch):
    """`eager` once was no name that transformers' registry knew, and `auto` ran instead."""
    ran = []

    def note(name):
        return lambda query, key, value, layout, **kwargs: (
            ran.append(name) or hstu_attention_naive(query, key, value, layout, **kwargs)
        )

    for key in HSTU_ATTENTION_FUNCTIONS:
        monkeypatch.setitem(HSTU_ATTENTION_FUNCTIONS, key, note(key))
    model = micro_model()
    model.set_attn_implementation(name)
    model(**batches.make_batch([3, 2]))
    assert ran == [name] * model.config.num_hidden_layers


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("sampling", ["uniform", "shared", "all"])
def test_padded_equals_packed(left, sampling, micro_model, batches):
    model = micro_model(negative_sampling=sampling)
    batch = batches.make_batch(LENGTHS, sampling=sampling)
    padded = batches.pad(batch, left=left)
    batches.assert_same(batches.by_id(model, [padded]), batches.by_id(model, [batch]))
    packed_query, padded_query = model(**batch).query_embeddings, model(**padded).query_embeddings
    mask = padded["attention_mask"].bool()
    assert padded_query.shape[:2] == mask.shape and not padded_query[~mask].any()
    torch.testing.assert_close(padded_query[mask], packed_query[0])


@pytest.mark.parametrize("split", [[[0, 1, 2], [3, 4, 5]], [[4], [0, 2], [], [5, 3, 1]]])
@pytest.mark.parametrize("sampling", ["uniform", "shared", "all"])
def test_micro_batches_do_not_change_the_step(split, sampling, micro_model, batches):
    """Law 1: loss and gradients of a step, with dropout and negatives on, for any micro-batches."""
    model = micro_model(negative_sampling=sampling)
    batch = batches.make_batch(LENGTHS, sampling=sampling)
    parts = [batches.take_users(batch, users) for users in split]
    batches.assert_same(batches.by_id(model, parts), batches.by_id(model, [batch]))


def test_gradient_checkpointing_changes_nothing(micro_model, batches):
    model, batch = micro_model(), batches.make_batch(LENGTHS)
    want = batches.by_id(model, [batch])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batches.assert_same(batches.by_id(model, [batch]), want, atol=0)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_empty_micro_batch_reaches_every_parameter(lengths, micro_model, batches):
    """ZeRO counts on a gradient for every parameter in every backward pass."""
    model = micro_model()
    batches.by_id(model, [batches.make_batch(lengths), batches.make_batch([3])])
    loss = model(**batches.make_batch(lengths), num_items_in_batch=4).loss
    assert loss.item() == 0 and loss.requires_grad
    model.zero_grad()
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_no_trained_label_gives_zero_and_a_graph(micro_model, batches):
    model = micro_model()
    loss = model(**batches.make_batch([4, 2], trained=0.0)).loss
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None for p in model.parameters())


def test_bf16_trains_close_to_float32(micro_model, batches):
    batch = batches.make_batch(LENGTHS)
    want = batches.by_id(micro_model(), [batch])
    got = batches.by_id(micro_model(dtype=torch.bfloat16), [batch])
    assert got[0].dtype == torch.float32
    assert abs(got[0] - want[0]) < 0.05 * want[0]
    for name, grad in want[1].items():
        assert got[1][name].dtype == torch.bfloat16
        assert (got[1][name].float() - grad).norm() < 0.1 * grad.norm() + 1e-3, name


def test_num_items_in_batch_divides_the_sum(micro_model, batches):
    model, batch = micro_model(hidden_dropout=0.0), batches.make_batch(LENGTHS)
    trained = int(batch["label_mask"].sum())
    mean, quarter = model(**batch).loss, model(**batch, num_items_in_batch=4 * trained).loss
    torch.testing.assert_close(quarter * 4, mean)
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(trained)).loss, mean)


def test_dropout_without_keys_follows_torchs_generator(micro_model, batches):
    model = micro_model()
    batch = {k: v for k, v in batches.make_batch(LENGTHS).items() if k != "token_keys"}
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**batch).loss.item())
    assert losses[0] == losses[1] != losses[2]
    assert model.eval()(**batch).loss == model(**batch).loss


def test_embedding_ids_leave_out_padding_and_masked_labels(micro_model, batches):
    model, batch = micro_model(), batches.make_batch(LENGTHS)
    ids = model.embedding_ids(batches.pad(batch, left=True))
    mask = batch["label_mask"][0]
    assert torch.equal(ids["input_ids"], batch["input_ids"])
    assert torch.equal(ids["labels"], batch["labels"][0][mask])
    assert torch.equal(ids["negative_ids"], batch["negative_ids"][0][mask])
    everything = torch.cat([x.flatten() for x in ids.values()])
    assert 1 not in everything and -(2**62) not in everything
    without = {k: v for k, v in batch.items() if k != "negative_ids"}
    assert set(model.embedding_ids(without)) == {"input_ids"}
    assert set(model.model.embedding_ids(batch)) == {"input_ids"}


def test_hidden_states_and_tuples(micro_model, batches):
    model, batch = micro_model().eval(), batches.make_batch(LENGTHS)
    output = model(**batch, output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(sum(LENGTHS), 6)] * 2 + [(1, sum(LENGTHS), 6)]
    padded = batches.pad(batch, left=True)
    states = model.model(padded["input_ids"], padded["attention_mask"], timestamps=padded["timestamps"],
                         output_hidden_states=True)  # fmt: skip
    assert torch.equal(states.hidden_states[-1], states.last_hidden_state)
    assert torch.equal(model(**batch, return_dict=False)[1], output.query_embeddings)


def test_state_dict_keys_are_a_contract(micro_model):
    layer = ["o_proj.bias", "o_proj.weight", "position_bias", "time_bias", "uvqk_proj.weight"]
    want = [f"model.layers.{i}.{name}" for i in (0, 1) for name in layer] + ["model.position_embedding.weight"]
    assert sorted(micro_model().state_dict()) == sorted(want)
    assert not [k for k in micro_model(use_time_bias=False).state_dict() if "time_bias" in k]


def test_initial_weights_follow_the_paper():
    from grzoo.models import HSTUConfig

    torch.manual_seed(0)
    weights = HSTUForRetrieval(HSTUConfig(hidden_size=100)).state_dict()
    assert weights["model.layers.0.uvqk_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["model.layers.1.position_bias"].std().item() == pytest.approx(0.02, rel=0.1)
    assert weights["model.layers.1.o_proj.weight"].abs().max().item() == pytest.approx(math.sqrt(6 / 150), rel=0.01)
    assert weights["model.position_embedding.weight"].abs().max().item() <= 0.2


def test_flops_count_the_products():
    """By hand for D = 2, H = 3, dqk = 5, dv = 7, one layer, N = 4, L = 2."""
    from grzoo.models import HSTUConfig

    config = HSTUConfig(
        hidden_size=2,
        num_hidden_layers=1,
        num_attention_heads=3,
        attention_head_dim=5,
        linear_head_dim=7,
        num_negatives=4,
    )
    projections = 2 * (2 * 2 * (3 * (2 * 7 + 2 * 5))) + 2 * (2 * 3 * 7 * 2)
    attention = 3 * 2 * (5 + 7) * 3  # three causal pairs, a multiplication and an addition, three heads
    assert config.flops([2, 0]).tolist() == [projections + attention + 2 * 2 * 2 * 5, 0]
    assert HSTUForRetrieval(config).flops([2])[0] == config.flops([2])[0]


class TestBadInput:
    def test_training_without_sparse_optimizer(self, batches):
        from grzoo.models import HSTUConfig

        model = HSTUForRetrieval(HSTUConfig(hidden_size=4, num_negatives=3)).train()
        with pytest.raises(ValueError, match="no sparse optimizer is attached"):
            model(**batches.make_batch([3]))

    def test_too_long(self, micro_model, batches):
        with pytest.raises(ValueError, match="24 events, but max_position_embeddings is 23: keep the last 20"):
            micro_model()(**batches.make_batch([24]))

    def test_no_timestamps(self, micro_model, batches):
        batch = {k: v for k, v in batches.make_batch([3]).items() if "timestamps" not in k}
        with pytest.raises(ValueError, match="timestamps are missing.*use_time_bias"):
            micro_model()(**batch)
        micro_model(use_time_bias=False)(**batch)

    def test_labels_without_negatives(self, micro_model, batches):
        batch = {k: v for k, v in batches.make_batch([3]).items() if k != "negative_ids"}
        model = micro_model()
        with pytest.raises(ValueError, match="labels are given without negative_ids"):
            model(**batch)
        assert model.eval()(**batch).loss is None

    def test_the_other_kind_of_negatives(self, micro_model, batches):
        with pytest.raises(ValueError, match="negative_sampling is 'uniform'.*3 dimensions"):
            micro_model()(**batches.make_batch([3], sampling="shared"))
        shared = micro_model(negative_sampling="shared")
        with pytest.raises(ValueError, match="'shared'.*1 dimensions"):
            shared(**batches.make_batch([3]))
        without = {k: v for k, v in batches.make_batch([3], sampling="shared").items() if k != "label_log_q"}
        with pytest.raises(ValueError, match="label_log_q"):
            shared(**without)

    def test_a_label_outside_the_catalogue(self, micro_model, batches):
        batch = batches.make_batch([3], sampling="all", trained=1.0)
        batch["negative_ids"] = batch["negative_ids"][:0]
        with pytest.raises(ValueError, match="must be the whole catalogue"):
            micro_model(negative_sampling="all")(**batch)

    def test_broken_starts(self, micro_model, batches):
        batch = batches.make_batch([3, 2])
        batch["cu_seq_lens_q"] = torch.tensor([0, 4, 3])
        with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 5"):
            micro_model()(**batch)

    @pytest.mark.parametrize("name", ["fast", "grouped", "varlen", "sdpa"])
    def test_unknown_attention(self, name, micro_model):
        model = micro_model()
        with pytest.raises(ValueError, match=f"attn_implementation='{name}' is not available.*choose from .*'eager'"):
            model.set_attn_implementation(name)
        with pytest.raises(ValueError, match="choose from"):
            HSTUForRetrieval._from_config(model.config, attn_implementation=name)

    def test_an_item_twice_in_the_catalogue(self, micro_model, batches):
        """It would stand twice in the denominator of the softmax."""
        batch = batches.make_batch([3], sampling="all", trained=1.0)
        batch["negative_ids"] = torch.cat([batch["negative_ids"], batch["negative_ids"][:1]])
        with pytest.raises(ValueError, match="negative_ids hold an item twice"):
            micro_model(negative_sampling="all")(**batch)

    def test_shared_log_q_of_another_length(self, micro_model, batches):
        batch = batches.make_batch([3], sampling="shared")
        batch["negative_log_q"] = batch["negative_log_q"][:1]
        with pytest.raises(ValueError, match=r"negative_log_q has shape \(1,\), but negative_ids \(3,\)"):
            micro_model(negative_sampling="shared")(**batch)


def test_float32_by_the_default_paths_equals_float64(micro_model, batches):
    """What users run (float32, the host kernels where there is a compiler) against the float64 form checked above."""
    batch = batches.make_batch(LENGTHS)
    got, want = batches.by_id(micro_model(), [batch]), batches.by_id(micro_model(dtype=torch.float64), [batch])
    dense = {name: grad.float() for name, grad in want[1].items()}
    batches.assert_same(got, (want[0].float(), dense, want[2]), atol=1e-5)
