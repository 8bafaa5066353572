"""No kernel reads beyond what it was given: a tensor of another size is refused by its name."""

from pathlib import Path

import pytest
import torch
from grzoo.models import ops
from grzoo.models.ops import (
    Visibility,
    full_softmax_loss,
    hstu_attention_host,
    sampled_softmax_loss_host,
    silu_attention_host,
)
from grzoo.models.ops.host import available
from grzoo.models.ops.keyed_dropout import keyed_dropout_host
from grzoo.models.ops.norm_gate_dropout import norm_gate_dropout_host
from grzoo.models.packing import JaggedLayout

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler")
T, H, D, N = 5, 2, 4, 7


def layout():
    made = JaggedLayout.from_cu_seq_lens(torch.tensor([0, 2, T]), T)
    made.timestamps = made.target_timestamps = torch.arange(T)
    return made


def tokens(*shape):
    return torch.randn(shape or (T, H, D))


def integers(*shape):
    return torch.zeros(shape, dtype=torch.int64)


HSTU = {
    "query": tokens(), "key": tokens(), "value": tokens(T, H, 3),
    "position_table": tokens(2 * N - 1), "timestamps": integers(T), "target_timestamps": integers(T),
}  # fmt: skip
SILU = {
    "query": tokens(), "key": tokens(), "value": tokens(T, H, 3),
    "query_times": integers(T), "key_times": integers(T), "divisors": torch.ones(T),
}  # fmt: skip
SAMPLED = {
    "query": tokens(T, D), "rows": tokens(9, D), "positive_index": integers(T), "negative_index": integers(T, 3),
    "accidental": torch.zeros(T, 3, dtype=torch.bool),
}  # fmt: skip
GATE = {"x": tokens(T, D), "gate": tokens(T, D), "token_keys": integers(T)}
FULL = {"query": tokens(T, D), "items": tokens(9, D), "target": integers(T)}


def hstu(query, key, value, position_table, timestamps, target_timestamps):
    where = layout()
    where.timestamps, where.target_timestamps = timestamps, target_timestamps
    tables = {"position_table": position_table, "time_table": torch.zeros(3)}
    return hstu_attention_host(query, key, value, where, max_length=N, **tables)


def silu(query, key, value, query_times, key_times, divisors):
    return silu_attention_host(query, key, value, layout(), Visibility(query_times, key_times), divisors=divisors)


def sampled(**given):
    return sampled_softmax_loss_host(**given, temperature=1.0)


def gate(x, gate, token_keys):
    return norm_gate_dropout_host(x, gate, eps=1e-6, p=0.5, token_keys=token_keys)


def dropout(x, token_keys):
    return keyed_dropout_host(x, 0.5, token_keys, 0)


CASES = [
    (hstu, HSTU, "query", tokens(T - 1, H, D)),
    (hstu, HSTU, "key", tokens(T - 1, H, D)),
    (hstu, HSTU, "value", tokens(1, H, 3)),
    (hstu, HSTU, "position_table", tokens(2 * N - 3)),
    (hstu, HSTU, "timestamps", integers(1)),
    (hstu, HSTU, "target_timestamps", integers(T + 1)),
    (silu, SILU, "query", tokens(T - 1, H, D)),
    (silu, SILU, "value", tokens(T, 1, 3)),
    (silu, SILU, "query_times", integers(1)),
    (silu, SILU, "key_times", integers(T - 1)),
    (silu, SILU, "divisors", torch.ones(1)),
    (sampled, SAMPLED, "rows", tokens(9, D - 1)),
    (sampled, SAMPLED, "positive_index", integers(1)),
    (sampled, SAMPLED, "negative_index", integers(T - 1, 3)),
    (sampled, SAMPLED, "accidental", torch.zeros(T, 1, dtype=torch.bool)),
    (gate, GATE, "gate", tokens(T - 1, D)),
    (gate, GATE, "token_keys", integers(1)),
    (dropout, {name: GATE[name] for name in ("x", "token_keys")}, "token_keys", integers(1)),
    (full_softmax_loss, FULL, "items", tokens(9, D + 1)),
    (full_softmax_loss, FULL, "target", integers(1)),
]


@pytest.mark.parametrize("function, fits, name, other", CASES, ids=[f"{c[0].__name__}-{c[2]}" for c in CASES])
def test_a_tensor_of_another_size_is_named(function, fits, name, other):
    assert function(**fits).isfinite().all()
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        function(**fits | {name: other})


def test_too_many_time_buckets_are_named():
    where = layout()
    with pytest.raises(ValueError, match="takes 1 to 160 time buckets, got 161"):
        hstu_attention_host(
            *(tokens() for _ in range(3)), where, max_length=N, position_table=tokens(2 * N - 1),
            time_table=torch.zeros(161),
        )  # fmt: skip


def test_a_sequence_beyond_the_maximum_is_named_by_the_kernel_too():
    arguments = (tokens(), tokens(), tokens(), torch.tensor([0, T]), tokens(2 * 4 - 1), None, None, None, 4)
    with pytest.raises(ValueError, match="A sequence is longer than max_length, 4"):
        torch.ops.grzoo.hstu_attention_host(*arguments)


def test_every_op_exports_its_naive_twin():
    exported = {getattr(ops, name).__module__ for name in ops.__all__}
    twins = {f"grzoo.models.ops.{file.parent.name}.naive" for file in Path(ops.__file__).parent.glob("*/naive.py")}
    assert len(twins) >= 8 and twins <= exported
