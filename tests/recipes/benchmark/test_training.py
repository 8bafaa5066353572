"""The baseline of the training benchmark is HSTU: the same loss and gradients as the model; the module runs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from grzoo.embeddings import SparseSGD
from grzoo.models import HSTUConfig, HSTUForRetrieval
from grzoo.models.packing import JaggedLayout, next_timestamps
from grzoo.recipes.benchmark.padded_hstu import PaddedHSTU
from torch.nn.utils.rnn import pad_sequence

LENGTHS, NUM_ITEMS, NUM_NEGATIVES = [5, 1, 9], 20, 6


@pytest.mark.parametrize("use_time_bias", [True, False])
def test_padded_step_equals_the_model(use_time_bias):
    torch.manual_seed(0)
    config = HSTUConfig(
        hidden_size=8, num_attention_heads=2, attention_head_dim=4, linear_head_dim=4, hidden_dropout=0.0,
        use_time_bias=use_time_bias, num_negatives=NUM_NEGATIVES, max_sequence_length=10, max_position_embeddings=12,
    )  # fmt: skip
    model, padded = HSTUForRetrieval(config).train(), PaddedHSTU(config, NUM_ITEMS).train()
    _optimizer = SparseSGD(model.embeddings, lr=0.1)  # a table in training mode needs one
    _copy(model, padded)
    total = sum(LENGTHS)
    items, labels = torch.randint(1, NUM_ITEMS + 1, (2, total))
    negatives = torch.randint(1, NUM_ITEMS + 1, (1, total, NUM_NEGATIVES))
    times = torch.randint(0, 10**6, (total,)).sort().values
    starts = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    layout = JaggedLayout.from_cu_seq_lens(starts, total)
    targets = next_timestamps(layout, times, None)
    packed = dict(
        input_ids=items[None], labels=labels[None], negative_ids=negatives, cu_seq_lens_q=starts,
        timestamps=times[None], target_timestamps=targets[None], num_items_in_batch=1,
    )  # fmt: skip
    loss = model(**packed).loss
    pad = lambda x: pad_sequence(list(x.split(LENGTHS)), batch_first=True)  # noqa: E731
    reference = padded(pad(items), pad(times), pad(targets), pad(labels), negatives[0])
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-4)
    loss.backward()
    reference.backward()
    for ours, theirs in zip(model.model.layers, padded.layers, strict=True):
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


def _copy(model, padded):
    ids = torch.arange(1, NUM_ITEMS + 1)
    rows = torch.randn(NUM_ITEMS, padded.items.embedding_dim)
    model.embeddings.import_rows("items", {"ids": ids, "rows": rows})
    with torch.no_grad():
        padded.items.weight[1:] = rows
        padded.position_embedding.weight.copy_(model.model.position_embedding.weight)
    padded.layers.load_state_dict(model.model.layers.state_dict())


@pytest.mark.slow
def test_two_ranks_end_with_one_line_of_json(tmp_path):
    csv = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "grzoo.recipes.benchmark.training", "--rounds", "2", "--csv", str(csv)]
    environment = {key: value for key, value in os.environ.items() if key != "GRZOO_DATA"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["speedup_vs_padded"] > 1 and 0 < figures["mfu"] < 1
    assert len(csv.read_text().splitlines()) == 3
