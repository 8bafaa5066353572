"""What a user of transformers expects of any model, whichever it is."""

import io
import pickle
import warnings

import pytest
import torch
from grzoo.models import MTGRConfig, MTGRForRanking

HISTORY = torch.tensor([[3, 4, 5, 6], [9, 8, 0, 0]])
FIELDS = {"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), "timestamps": HISTORY.cumsum(1)}


@pytest.fixture(params=["hstu", "sasrec"])
def build(request, micro_model, micro_sasrec):
    return {"hstu": micro_model, "sasrec": micro_sasrec}[request.param]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_reaches_layers_behind_frozen_vectors(use_reentrant, build, batches, caplog):
    """And says no word of input embeddings that are missing: the vectors of items come from tables."""
    model, batch = build(), batches.make_batch([5, 3])
    rows = model.embeddings(model.embedding_ids(batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_activation_checkpointing and all(layer.gradient_checkpointing for layer in model.model.layers)
    model.model.position_embedding.requires_grad_(False)
    output = model.model(**batch, embeddings={name: x.detach() for name, x in rows.items()})
    output.last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.model.layers[0].o_proj.parameters())
    model.disable_input_require_grads()
    assert not model.model.position_embedding._forward_hooks
    assert "Gradients cannot flow" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_a_compiled_hstu_takes_the_same_steps(attention, micro_model, batches):
    """With dropout, whose keys are 64-bit words, and lengths that differ from step to step."""
    model, batches_of_steps = micro_model(), [batches.make_batch([3, 5], seed=1), batches.make_batch([7, 1], seed=2)]
    model.set_attn_implementation(attention)
    want = [batches.by_id(model, [batch]) for batch in batches_of_steps]
    torch.compiler.reset()
    model.compile()
    for batch, result in zip(batches_of_steps, want, strict=True):
        batches.assert_same(batches.by_id(model, [batch]), result)
    model(**batches_of_steps[0]).loss.backward()  # looks the rows up itself


@pytest.mark.slow
def test_a_compiled_sasrec_takes_the_same_steps(micro_sasrec, batches):
    model, batch = micro_sasrec(), batches.make_batch([3, 5])
    want = batches.by_id(model, [batch])
    torch.compiler.reset()
    model.compile()
    batches.assert_same(batches.by_id(model, [batch]), want)


def test_exporting_is_refused_in_words(build, ranking_model, ranking):
    with pytest.raises(NotImplementedError, match="torch.export cannot hold this model.*save_pretrained"):
        torch.export.export(build().eval(), (HISTORY,), FIELDS)
    mtgr, batch = ranking_model(MTGRForRanking, MTGRConfig).eval(), ranking.make_ranking_batch([5, 3], [2, 1])
    with pytest.raises(NotImplementedError, match="torch.export cannot hold this model"):
        torch.export.export(mtgr, (), batch)


def test_pickling_is_refused_in_words(build):
    model = build()
    for write in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(TypeError, match="tables are not pickled.*save_pretrained"):
            write(model)
    torch.save(model.state_dict(), io.BytesIO())  # dense weights alone
