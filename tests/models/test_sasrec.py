"""SASRec against an independent dense form of its equations, and the laws that its batches obey."""

import pytest
import torch
from grzoo.models import AutoModelForRetrieval, SASRecConfig, SASRecForRetrieval
from grzoo.models.ops import keyed_dropout_naive, softmax_attention_naive
from grzoo.models.ops.softmax_attention import SOFTMAX_ATTENTION_FUNCTIONS
from torch.nn import functional as F

LENGTHS = [5, 1, 0, 9, 20, 2]
LOSSES = [
    {"loss": "bce"},
    {"loss": "gbce", "num_items": 19},
    {"loss": "softmax"},
    {"loss": "softmax", "similarity": "cosine", "temperature": 0.5},
    {"loss": "softmax", "negative_sampling": "shared"},
    {"loss": "softmax", "negative_sampling": "all"},
]
FORMS = [
    {},
    {"layer_norm": "pre", "intermediate_size": 9, "position_alignment": "start"},
    {"layer_norm": "post", "hidden_act": "gelu", "scale_items": False, "num_attention_heads": 1},
    {"layer_norm": "post_final", "intermediate_size": 9},
]


def batch_for(model, batches):
    return batches.make_batch(LENGTHS, sampling=model.config.negative_sampling)


def user_states(weights, config, vectors, keys):
    """Output [L, D] for one user's item vectors [L, D], straight from the equations; dense, with torch's functions."""
    length, width, heads = len(vectors), config.hidden_size, config.num_attention_heads
    first = config.max_sequence_length - length if config.position_alignment == "end" else 0

    def norm(x, name):
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps)

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def dropout(x, site):
        return keyed_dropout_naive(x, config.hidden_dropout, keys, site)

    x = vectors * (width**0.5 if config.scale_items else 1)
    x = x + weights["model.position_embedding.weight"][first : first + length]
    x = dropout(norm(x, "model.norm") if config.layer_norm == "post" else x, 0)
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"

        def attention(queries, keys_and_values, at=at):
            q, k, v = linear(queries, f"{at}.q_proj"), *(linear(keys_and_values, f"{at}.{n}_proj") for n in "kv")
            q, k, v = (t.view(length, heads, -1).transpose(0, 1) for t in (q, k, v))
            scores = q @ k.mT / (width / heads) ** 0.5
            scores = scores + torch.full((length, length), -torch.inf).triu(1)
            return linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(length, width), f"{at}.o_proj")

        def feed_forward(x, at=at, i=i):
            inner = F.relu(linear(x, f"{at}.up_proj"))
            if config.hidden_act == "gelu":
                inner = F.gelu(linear(x, f"{at}.up_proj"))
            return dropout(linear(dropout(inner, 2 + 3 * i), f"{at}.down_proj"), 3 + 3 * i)

        if config.layer_norm == "original":  # the authors' code: the residual is the normalised query
            q = norm(x, f"{at}.attention_norm")
            x = norm(q + dropout(attention(q, x), 1 + 3 * i), f"{at}.feed_forward_norm")
            x = x + feed_forward(x)
        elif config.layer_norm == "pre":
            q = norm(x, f"{at}.attention_norm")
            x = x + dropout(attention(q, q), 1 + 3 * i)
            x = x + feed_forward(norm(x, f"{at}.feed_forward_norm"))
        else:
            x = norm(x + dropout(attention(x, x), 1 + 3 * i), f"{at}.attention_norm")
            x = norm(x + feed_forward(x), f"{at}.feed_forward_norm")
    return x if config.layer_norm == "post" else norm(x, "model.norm")


def token_loss(config, query, positive, negatives, is_positive, log_q):
    """Loss of one token: positive [D], negatives [N, D]."""
    if config.similarity == "cosine":
        query, positive, negatives = (F.normalize(x, dim=-1) for x in (query, positive, negatives))
    s, t = positive @ query / config.temperature, negatives @ query / config.temperature
    if config.loss == "softmax":
        if log_q is not None:
            s, t = s - log_q[0], t - log_q[1]
        return torch.logsumexp(torch.cat([s[None], t[~is_positive]]), 0) - s
    power = 1.0
    if config.loss == "gbce":
        rate = config.num_negatives / (config.num_items - 1)
        power = 1 - config.gbce_calibration * (1 - rate)  # the published formula, simplified
    return -power * F.logsigmoid(s) - F.logsigmoid(-t[~is_positive]).sum()


def dense_loss(weights, config, item, batch):
    """Mean loss over the trained tokens, one user and one token at a time, and the states [T, D]."""
    starts, total, states = batch["cu_seq_lens_q"].tolist(), [], []
    for begin, end in zip(starts, starts[1:], strict=False):
        if begin == end:
            continue
        part = slice(begin, end)
        out = user_states(weights, config, item(batch["input_ids"][0, part]), batch["token_keys"][0, part])
        states.append(out)
        for place, at in enumerate(range(begin, end)):
            if batch["label_mask"][0, at]:
                label = batch["labels"][0, at]
                negative = batch["negative_ids"] if batch["negative_ids"].dim() == 1 else batch["negative_ids"][0, at]
                log_q = (batch["label_log_q"][0, at], batch["negative_log_q"]) if "label_log_q" in batch else None
                total.append(token_loss(config, out[place], item(label), item(negative), negative == label, log_q))
    return torch.stack(total).mean(), torch.cat(states)


@pytest.mark.parametrize("attn_implementation", ["auto", "naive"])
@pytest.mark.parametrize("form", FORMS, ids=["original", "pre", "post", "post_final"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_equals_the_dense_equations(loss, form, attn_implementation, micro_sasrec, batches):
    model = micro_sasrec(dtype=torch.float64, **form, **loss)
    model.set_attn_implementation(attn_implementation)
    batch = batch_for(model, batches)
    got_loss, dense, rows = batches.by_id(model, [batch])
    with torch.no_grad():
        known = model.embeddings({"input_ids": torch.tensor(list(rows))}, insert=False)["input_ids"]
    table = {i: row.double().requires_grad_() for i, row in zip(rows, known, strict=True)}

    def item(ids):
        return torch.stack([table[i] for i in ids.flatten().tolist()]).view(*ids.shape, -1)

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    want, states = dense_loss(weights, model.config, item, batch)
    want.backward()
    wanted = {name: w.grad for name, w in weights.items()}
    gradients = {i: r.grad.float() if r.grad is not None else torch.zeros(6) for i, r in table.items()}
    batches.assert_same((got_loss, dense, rows), (want.detach(), wanted, gradients))
    if model.config.similarity == "dot":
        torch.testing.assert_close(model(**batch).query_embeddings[0], states.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layer_norm", ["pre", "post", "post_final"])
@torch.no_grad()
def test_pre_and_post_are_torchs_encoder_layers(layer_norm):
    """`nn.TransformerEncoderLayer` with the same weights, norm_first for pre, causal."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "max_sequence_length": 7}
    form = {"layer_norm": layer_norm, "hidden_act": "gelu", "scale_items": False, "unknown_items": "initial"}
    model = SASRecForRetrieval(SASRecConfig(**sizes, **form, position_alignment="start")).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.5)
    history = torch.arange(1, 7)
    body = model.model
    x = model.item_embeddings(history) + body.position_embedding.weight[: len(history)]
    x = body.norm(x) if layer_norm == "post" else x
    mask = torch.nn.Transformer.generate_square_subsequent_mask(len(history))
    for ours in body.layers:
        theirs = torch.nn.TransformerEncoderLayer(
            8, 2, 12, activation="gelu", layer_norm_eps=1e-8, norm_first=layer_norm == "pre", batch_first=True
        ).eval()
        for name, parts in {
            "self_attn.in_proj": ("q_proj", "k_proj", "v_proj"),
            "self_attn.out_proj": ("o_proj",),
        }.items():
            separator = "_" if len(parts) > 1 else "."
            for kind in ("weight", "bias"):
                joined = torch.cat([getattr(getattr(ours, part), kind) for part in parts])
                theirs.get_parameter(f"{name}{separator}{kind}").copy_(joined)
        for name, part in {
            "linear1": "up_proj",
            "linear2": "down_proj",
            "norm1": "attention_norm",
            "norm2": "feed_forward_norm",
        }.items():
            getattr(theirs, name).load_state_dict(getattr(ours, part).state_dict())
        x = theirs(x.unsqueeze(0), src_mask=mask)[0]
    want = x if layer_norm == "post" else body.norm(x)
    torch.testing.assert_close(model(history.unsqueeze(0)).query_embeddings[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("form", [*FORMS, LOSSES[4], LOSSES[5]], ids=str)
def test_padded_equals_packed(left, form, micro_sasrec, batches):
    model = micro_sasrec(**form)
    batch = batch_for(model, batches)
    padded = batches.pad(batch, left=left)
    batches.assert_same(batches.by_id(model, [padded]), batches.by_id(model, [batch]))
    packed_query, padded_query = model(**batch).query_embeddings, model(**padded).query_embeddings
    mask = padded["attention_mask"].bool()
    torch.testing.assert_close(padded_query[mask], packed_query[0])


@pytest.mark.parametrize("split", [[[0, 1, 2], [3, 4, 5]], [[4], [0, 2], [], [5, 3, 1]]], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_micro_batches_do_not_change_the_step(loss, split, micro_sasrec, batches):
    """Law 1: loss and gradients of a step, with dropout and negatives on, for any micro-batches."""
    model = micro_sasrec(dtype=torch.float64, **loss)
    batch = batch_for(model, batches)
    parts = [batches.take_users(batch, users) for users in split]
    batches.assert_same(batches.by_id(model, parts), batches.by_id(model, [batch]))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_empty_micro_batch_reaches_every_parameter(loss, micro_sasrec, batches):
    """ZeRO counts on a gradient for every parameter in every backward pass."""
    model = micro_sasrec(**loss)
    for lengths in ([], [0, 0]):
        model.zero_grad()
        empty = batches.make_batch(lengths, sampling=model.config.negative_sampling)
        loss = model(**empty, num_items_in_batch=4).loss
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_gradient_checkpointing_changes_nothing(micro_sasrec, batches):
    model, batch = micro_sasrec(), batches.make_batch(LENGTHS)
    want = batches.by_id(model, [batch])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batches.assert_same(batches.by_id(model, [batch]), want, atol=0)


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[5]], ids=["bce", "all"])
def test_a_step_equals_a_plain_loop(loss, micro_sasrec, batches):
    """One optimizer step of dense weights and rows against torch's SGD on an nn.Embedding."""
    model = micro_sasrec(**loss)
    batch = batch_for(model, batches)
    ids = torch.arange(-7, 12) * 10**17
    with torch.no_grad():
        start = model.embeddings({"input_ids": ids}, insert=True)["input_ids"]
    table = torch.nn.Parameter(start.clone())
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    plain = torch.optim.SGD([table, *weights.values()], lr=0.1)
    dense_loss(weights, model.config, lambda i: table[i // 10**17 + 7], batch)[0].backward()
    plain.step()
    ours = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch).loss.backward()
    ours.step()
    model.embeddings.optimizer.step()
    with torch.no_grad():
        rows = model.embeddings({"input_ids": ids}, insert=False)["input_ids"]
    torch.testing.assert_close(rows, table.detach(), atol=1e-5, rtol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_save_and_load(micro_sasrec, batches, tmp_path):
    model = micro_sasrec(layer_norm="post").eval()
    with torch.no_grad():
        model.embeddings({"candidate_ids": torch.arange(30)}, insert=True)
    history = torch.tensor([[3, 4, 5, 6]])
    want = model.recommend(history, top_k=5)
    scores = model.encode(history) @ model.item_embeddings(torch.arange(30)).T
    scores[0, history[0]] = -torch.inf
    assert want.item_ids.tolist() == scores.topk(5).indices.tolist()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForRetrieval.from_pretrained(tmp_path, embedding_backend="naive")
    assert type(loaded) is SASRecForRetrieval
    again = loaded.recommend(history, top_k=5, timestamps=history * 100)  # times are not looked at
    assert torch.equal(again.item_ids, want.item_ids) and torch.equal(again.scores, want.scores)


def test_learns_on_one_core(micro_sasrec, batches):
    model = micro_sasrec(initializer_range=0.1, hidden_dropout=0.0, loss="softmax", negative_sampling="all")
    dense, batch = torch.optim.Adam(model.parameters(), lr=0.02), batches.make_batch([9, 12, 15], sampling="all")
    first = last = model(**batch).loss.item()
    for _ in range(60):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        dense.step()
        model.embeddings.optimizer.step()
        model.embeddings.optimizer.zero_grad()
        last = loss.item()
    assert last < 0.6 * first


@pytest.mark.parametrize("name", ["auto", "grouped", "varlen", "naive"])
def test_the_named_attention_runs(name, micro_sasrec, batches, monkeypatch):
    ran = []

    def note(name):
        return lambda *inputs: ran.append(name) or softmax_attention_naive(*inputs)

    for key in SOFTMAX_ATTENTION_FUNCTIONS:
        monkeypatch.setitem(SOFTMAX_ATTENTION_FUNCTIONS, key, note(key))
    model = micro_sasrec()
    model.set_attn_implementation(name)
    model(**batches.make_batch([3, 2]))
    assert ran == [name] * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["eager", "host", "sdpa"])
def test_unknown_attention(name, micro_sasrec):
    model = micro_sasrec()
    with pytest.raises(ValueError, match=f"attn_implementation='{name}' is not available.*choose from .*'grouped'"):
        model.set_attn_implementation(name)
    with pytest.raises(ValueError, match="choose from"):
        SASRecForRetrieval._from_config(model.config, attn_implementation=name)


def test_too_long(micro_sasrec, batches):
    with pytest.raises(ValueError, match="21 events, but max_sequence_length is 20"):
        micro_sasrec()(**batches.make_batch([21]))


def test_flops_count_the_products():
    """By hand for D = 2, F = 3, one layer, N = 4, L = 2."""
    config = SASRecConfig(hidden_size=2, intermediate_size=3, num_hidden_layers=1, num_negatives=4)
    projections, feed_forward = 4 * 2 * (2 * 2 * 2), 2 * 2 * (2 * 2 * 3)
    attention = 3 * 2 * (2 + 2)  # three causal pairs, a multiplication and an addition, q k and p v
    assert config.flops([2, 0]).tolist() == [projections + feed_forward + attention + 2 * 2 * 2 * 5, 0]
