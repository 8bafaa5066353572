"""What a user of transformers expects of any model, whichever it is."""

import warnings

import pytest
import torch

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
