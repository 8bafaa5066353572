"""Weights of public implementations: fixtures with their names and shapes, and their outputs by torch's own modules."""

import pytest
import torch
from grzoo.models import SASRecConfig, SASRecForRetrieval
from grzoo.models.sasrec import convert_weights, load_public_weights
from torch import nn

ITEMS, POSITIONS, WIDTH, INNER = 7, 6, 4, 8
HISTORY = torch.tensor([[3, 1, 7, 2]])
FULL = torch.tensor([[5, 6, 3, 1, 7, 2]])  # as long as the window


def randn(*shape):
    return torch.randn(*shape) / 2


def pre_weights(rows_of_positions):
    """Names and shapes of the family with nn.MultiheadAttention and 1x1 convolutions."""
    torch.manual_seed(0)
    weights = {"item_emb.weight": randn(ITEMS + 1, WIDTH), "pos_emb.weight": randn(rows_of_positions, WIDTH)}
    for i in range(2):
        weights |= {
            f"attention_layernorms.{i}.weight": randn(WIDTH),
            f"attention_layernorms.{i}.bias": randn(WIDTH),
            f"attention_layers.{i}.in_proj_weight": randn(3 * WIDTH, WIDTH),
            f"attention_layers.{i}.in_proj_bias": randn(3 * WIDTH),
            f"attention_layers.{i}.out_proj.weight": randn(WIDTH, WIDTH),
            f"attention_layers.{i}.out_proj.bias": randn(WIDTH),
            f"forward_layernorms.{i}.weight": randn(WIDTH),
            f"forward_layernorms.{i}.bias": randn(WIDTH),
            f"forward_layers.{i}.conv1.weight": randn(WIDTH, WIDTH, 1),
            f"forward_layers.{i}.conv1.bias": randn(WIDTH),
            f"forward_layers.{i}.conv2.weight": randn(WIDTH, WIDTH, 1),
            f"forward_layers.{i}.conv2.bias": randn(WIDTH),
        }
    return weights | {"last_layernorm.weight": randn(WIDTH), "last_layernorm.bias": randn(WIDTH)}


def post_weights(plural):
    """Names and shapes of the family in BERT's order; `plural`: its older naming."""
    torch.manual_seed(0)
    s, block = ("s", "item_encoder.layer") if plural else ("", "trm_encoder.layer")
    attention, inner = ("attention", "intermediate") if plural else ("multi_head_attention", "feed_forward")
    shapes = {f"item_embedding{s}.weight": (ITEMS + 1 + plural, WIDTH), f"position_embedding{s}.weight": (6, WIDTH)}
    for i in range(2):
        for name in ("query", "key", "value", "dense"):
            shapes[f"{block}.{i}.{attention}.{name}.weight"] = (WIDTH, WIDTH)
            shapes[f"{block}.{i}.{attention}.{name}.bias"] = (WIDTH,)
        for name, shape in (("dense_1", (INNER, WIDTH)), ("dense_2", (WIDTH, INNER))):
            shapes[f"{block}.{i}.{inner}.{name}.weight"] = shape
            shapes[f"{block}.{i}.{inner}.{name}.bias"] = shape[:1]
        for part in (attention, inner):
            shapes[f"{block}.{i}.{part}.LayerNorm.weight"] = shapes[f"{block}.{i}.{part}.LayerNorm.bias"] = (WIDTH,)
    shapes |= {"LayerNorm.weight": (WIDTH,), "LayerNorm.bias": (WIDTH,)}
    return {name: randn(*shape) for name, shape in shapes.items()}


def module(cls, weights, prefix, *arguments, **options):
    """A module of torch with the weights below a prefix."""
    built = cls(*arguments, **options)
    built.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)})
    return built.eval()


def pre_states(w, padding_position, history, order, *, hide_padding=False):
    """What the code of the pre-LN family computes for the events of a history, in a window padded at its start.

    It hides the future alone, so the padding is among the keys; `hide_padding` takes it out, which that code does not.
    """
    length = history.shape[1]
    item = torch.cat([torch.zeros(POSITIONS - length, dtype=torch.long), history[0]])
    real = (item != 0)[:, None, None]
    places = torch.arange(POSITIONS) + padding_position
    x = (w["item_emb.weight"][item] * WIDTH**0.5 + w["pos_emb.weight"][places]).unsqueeze(1) * real
    mask = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).triu(1)
    if hide_padding:
        mask |= (item == 0) & ~torch.eye(POSITIONS, dtype=torch.bool)  # a row of padding sees itself
    for i in range(2):
        attention = module(nn.MultiheadAttention, w, f"attention_layers.{i}.", WIDTH, 2)
        before = module(nn.LayerNorm, w, f"attention_layernorms.{i}.", WIDTH, eps=1e-8)
        after = module(nn.LayerNorm, w, f"forward_layernorms.{i}.", WIDTH, eps=1e-8)
        first, second = (module(nn.Conv1d, w, f"forward_layers.{i}.conv{n}.", WIDTH, WIDTH, 1) for n in (1, 2))

        def feed_forward(x, first=first, second=second):
            return second(first(x.permute(1, 2, 0)).relu()).permute(2, 0, 1)

        if order == "original":
            q = before(x)
            x = after(q + attention(q, x, x, attn_mask=mask)[0])
            x = (x + feed_forward(x)) * real
        elif order == "pre":  # norm_first=True
            q = before(x)
            x = x + attention(q, q, q, attn_mask=mask)[0]
            x = x + feed_forward(after(x))
        else:  # norm_first=False
            x = before(x + attention(x, x, x, attn_mask=mask)[0])
            x = after(x + feed_forward(x))
    return module(nn.LayerNorm, w, "last_layernorm.", WIDTH, eps=1e-8)(x)[POSITIONS - length :, 0]


def post_states(w):
    """What the code of the post-LN family computes for HISTORY, positions from 0."""
    length = HISTORY.shape[1]
    s = "s" if "item_embeddings.weight" in w else ""
    block = "item_encoder.layer" if s else "trm_encoder.layer"
    attention, inner = ("attention", "intermediate") if s else ("multi_head_attention", "feed_forward")
    x = w[f"item_embedding{s}.weight"][HISTORY[0]] + w[f"position_embedding{s}.weight"][:length]
    x = module(nn.LayerNorm, w, "LayerNorm.", WIDTH, eps=1e-12)(x)
    for i in range(2):
        at, ff = f"{block}.{i}.{attention}.", f"{block}.{i}.{inner}."
        q, k, v = (
            module(nn.Linear, w, f"{at}{n}.", WIDTH, WIDTH)(x).view(length, 2, -1).transpose(0, 1)
            for n in ("query", "key", "value")
        )
        scores = q @ k.mT / (WIDTH / 2) ** 0.5 - 10000.0 * torch.ones(length, length).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, WIDTH)
        mixed = module(nn.Linear, w, f"{at}dense.", WIDTH, WIDTH)(mixed)
        x = module(nn.LayerNorm, w, f"{at}LayerNorm.", WIDTH, eps=1e-12)(x + mixed)
        hidden = nn.functional.gelu(module(nn.Linear, w, f"{ff}dense_1.", WIDTH, INNER)(x))
        hidden = module(nn.Linear, w, f"{ff}dense_2.", INNER, WIDTH)(hidden)
        x = module(nn.LayerNorm, w, f"{ff}LayerNorm.", WIDTH, eps=1e-12)(x + hidden)
    return x


def build(**fields):
    config = SASRecConfig(hidden_size=WIDTH, num_attention_heads=2, max_sequence_length=POSITIONS, **fields)
    return SASRecForRetrieval(config, embedding_backend="naive").eval()


@pytest.mark.parametrize("order", ["original", "pre", "post_final"])
@pytest.mark.parametrize("padding_position", [0, 1])
@torch.no_grad()
def test_pre_family_gives_the_same_states(padding_position, order):
    """Of a full window; shorter histories differ by the padding that the other code attends to, and by nothing else."""
    weights = pre_weights(POSITIONS + padding_position)
    model = build(layer_norm=order)
    load_public_weights(model, weights)
    torch.testing.assert_close(model(FULL).query_embeddings[0], pre_states(weights, padding_position, FULL, order))
    got = model(HISTORY).query_embeddings[0]
    without = pre_states(weights, padding_position, HISTORY, order, hide_padding=True)
    torch.testing.assert_close(got, without)
    assert not torch.allclose(got, pre_states(weights, padding_position, HISTORY, order), atol=1e-4)


@pytest.mark.parametrize("plural", [False, True])
@torch.no_grad()
def test_post_family_gives_the_same_states(plural):
    weights = post_weights(plural)
    model = build(
        layer_norm="post",
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        scale_items=False,
        intermediate_size=INNER,
        position_alignment="start",
    )
    load_public_weights(model, weights, torch.arange(1, ITEMS + 1))  # without the mask token of the older naming
    assert model.embeddings.num_rows() == ITEMS
    torch.testing.assert_close(model(HISTORY).query_embeddings[0], post_states(weights))


@torch.no_grad()
def test_items_get_the_ids_that_are_given():
    weights, model, ids = pre_weights(POSITIONS), build(), torch.arange(ITEMS) * -(10**15)
    load_public_weights(model, weights, ids)
    torch.testing.assert_close(model.item_embeddings(ids), weights["item_emb.weight"][1:])
    assert set(convert_weights(weights)) == {"items", *model.model.state_dict()}


def test_what_does_not_fit_is_named():
    weights = pre_weights(POSITIONS)
    with pytest.raises(ValueError, match="'dev' belongs to no known"):
        load_public_weights(build(), weights | {"dev": torch.ones(1)})
    with pytest.raises(ValueError, match="hold no item embeddings"):
        load_public_weights(build(), {})
    with pytest.raises(ValueError, match=r"do not fit the config.*layers.2.q_proj.weight"):
        load_public_weights(build(num_hidden_layers=3), weights)
    with pytest.raises(ValueError, match=r"do not fit the config: layers.0.up_proj.weight"):
        load_public_weights(build(intermediate_size=5), weights)
    with pytest.raises(ValueError, match="8 item ids were given, but the weights hold 7 items"):
        load_public_weights(build(), weights, torch.arange(8))


def test_an_order_that_the_other_code_does_not_have_is_refused():
    """Names and shapes would fit, and the states be wrong without a word."""
    with pytest.raises(ValueError, match=r"no layer_norm 'post'.*one of \['original', 'pre', 'post_final'\]"):
        load_public_weights(build(layer_norm="post"), pre_weights(POSITIONS))
    for order in ("original", "pre", "post_final"):
        with pytest.raises(ValueError, match=rf"no layer_norm '{order}'.*one of \['post'\]"):
            load_public_weights(build(layer_norm=order, intermediate_size=INNER), post_weights(False))
