"""Law 5: the eager attention equals its naive twin, forward and every gradient, at odd, empty and long lengths."""

import itertools
import math

import pytest
import torch
from grzoo.models.ops import hstu_attention, hstu_attention_eager, hstu_attention_naive
from grzoo.models.ops.hstu_attention import grouping
from grzoo.models.ops.hstu_attention.bias import (
    position_bias,
    position_bias_gradient,
    time_bias_gradient,
    time_buckets,
)
from grzoo.models.packing import JaggedLayout

N = 140
LENGTHS = {"odd": [0, 1, 17, 3, 0, 130, 65, 64, 2, 63, 128], "one": [1], "no users": [], "no tokens": [0, 0]}
NAMES = ("out", "query", "key", "value", "position_table", "time_table")


def layout_of(lengths):
    total = sum(lengths)
    times = torch.randint(0, 10**8, (total,))
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    return JaggedLayout.from_cu_seq_lens(
        starts, total, timestamps=times, target_timestamps=times + torch.randint(0, 10**6, (total,))
    )


def run(function, layout, inputs, grad):
    query, key, value, position, time = inputs
    layout.cache.clear()
    out = function(query, key, value, layout, max_length=N, position_table=position, time_table=time)
    leaves = [x for x in inputs if x is not None]
    return [out, *torch.autograd.grad(out, leaves, grad)]


def inputs_of(total, heads, dtype, with_time, dqk=5, dv=7):
    shapes = [(total, heads, dqk), (total, heads, dqk), (total, heads, dv), (2 * N - 1,), (129,)]
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return tensors if with_time else [*tensors[:4], None]


@pytest.mark.parametrize("with_time", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_eager_equals_naive(dtype, tolerance, lengths, heads, with_time):
    torch.manual_seed(0)
    layout = layout_of(lengths)
    inputs = inputs_of(layout.num_tokens, heads, dtype, with_time)
    grad = torch.randn(layout.num_tokens, heads, 7, dtype=dtype)
    expected = run(hstu_attention_naive, layout, inputs, grad)
    for name, want, got in zip(NAMES, expected, run(hstu_attention_eager, layout, inputs, grad), strict=False):
        assert got.dtype == dtype and got.shape == want.shape, name
        scale = want.abs().max().clamp_min(1e-9) if want.numel() else 1
        torch.testing.assert_close(got / scale, want / scale, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_unwritten_memory_does_not_leak(monkeypatch):
    """torch.empty filled with NaN: the eager path writes all it returns, padded places included."""
    torch.manual_seed(0)
    layout = layout_of([5, 0, 9, 70, 3])
    inputs = inputs_of(layout.num_tokens, 2, torch.float32, True)
    grad = torch.randn(layout.num_tokens, 2, 7)
    expected = run(hstu_attention_eager, layout, inputs, grad)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        poisoned = run(hstu_attention_eager, layout, inputs, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, want, got in zip(NAMES, expected, poisoned, strict=True):
        assert torch.equal(want, got), name


@pytest.mark.parametrize("lengths", [[5, 0, 9, 130, 3]])
def test_bf16_is_close_and_bias_is_float32(lengths):
    torch.manual_seed(0)
    layout = layout_of(lengths)
    inputs = inputs_of(layout.num_tokens, 2, torch.float32, True)
    grad = torch.randn(layout.num_tokens, 2, 7)
    expected = run(hstu_attention_naive, layout, inputs, grad)
    low = [x.detach().bfloat16().requires_grad_() for x in inputs]
    for name, want, got in zip(NAMES, expected, run(hstu_attention_eager, layout, low, grad.bfloat16()), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).abs().max() <= 0.02 * want.abs().max(), name


def test_sequences_do_not_mix_and_the_future_is_masked():
    torch.manual_seed(0)
    layout = layout_of([6, 8])
    q, k, v, position, time = inputs_of(14, 1, torch.float64, True)
    out = hstu_attention_eager(q, k, v, layout, max_length=N, position_table=position, time_table=time)
    (grad,) = torch.autograd.grad(out[9].sum(), v)  # the fourth token of the second sequence
    assert grad.abs().sum((1, 2)).nonzero().flatten().tolist() == [6, 7, 8, 9]


def test_micro_batch_alone_gives_the_same_rows():
    """Law 1: what shares a micro-batch (and so a group) changes a row by rounding at most."""
    torch.manual_seed(0)
    layout = layout_of([20, 21, 3])
    q, k, v, position, time = inputs_of(44, 2, torch.float64, True)
    tables = dict(max_length=N, position_table=position, time_table=time)
    together = hstu_attention_eager(q, k, v, layout, **tables)
    alone = JaggedLayout(torch.tensor([0, 21]), [21], layout.timestamps[20:41], layout.target_timestamps[20:41])
    rows = slice(20, 41)
    torch.testing.assert_close(hstu_attention_eager(q[rows], k[rows], v[rows], alone, **tables), together[rows])


def test_time_buckets_follow_the_formula_at_every_boundary():
    """bucket(dt) = number of m >= 1 with |dt| >= e^(0.301 m), counted in exact integers."""
    boundaries = [math.exp(0.301 * m) for m in range(1, 130)]
    exact = [b for b in boundaries if b < 2**40]  # farther out e^x itself is not known to one
    differences = {0, 1, -1, 2} | {d for b in exact for d in (math.floor(b), math.ceil(b), -math.ceil(b))}
    got = time_buckets(torch.tensor(sorted(differences)), torch.tensor([0]), 129).flatten().tolist()
    assert got == [min(128, sum(b <= abs(d) for b in boundaries)) for d in sorted(differences)]
    assert time_buckets(torch.tensor([2**62]), torch.tensor([0]), 129).item() == 128
    assert time_buckets(torch.tensor([10**6]), torch.tensor([0]), 7).item() == 6


@pytest.mark.parametrize("first, rows, columns", [(0, 3, 3), (2, 3, 5), (0, 1, 1), (5, 4, 9)])
def test_position_bias_and_its_transpose(first, rows, columns):
    n = 9
    table = torch.randn(2 * n - 1, dtype=torch.float64)
    i, j = torch.arange(first, first + rows).unsqueeze(1), torch.arange(columns)
    assert torch.equal(position_bias(table, first, rows, columns), table[n - 1 + j - i])
    grad = torch.randn(rows, columns, dtype=torch.float64)
    expected = torch.zeros_like(table).index_put_((n - 1 + j - i,), grad, accumulate=True)
    got = torch.zeros_like(table)
    position_bias_gradient(grad, first, got)
    torch.testing.assert_close(got, expected)


def test_time_bias_gradient_by_one_hot_rows_as_on_a_gpu():
    grad, buckets = torch.randn(1000, dtype=torch.float64), torch.randint(0, 129, (1000,))
    on_cpu, elsewhere = torch.zeros(129, dtype=torch.float64), torch.zeros(129, dtype=torch.float64)
    time_bias_gradient(grad, buckets, on_cpu)
    time_bias_gradient(grad, buckets, elsewhere, atomic_free=True)
    torch.testing.assert_close(on_cpu, elsewhere)


def test_groups_hold_each_sequence_once_and_little_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 201, (500,), generator=generator).tolist()
    groups = grouping.group_lengths(lengths, max_area=1 << 16, block_rows=64)
    assert sorted(n for group in groups for n in group) == [n for n, length in enumerate(lengths) if length]
    padded = sum(len(group) * lengths[group[0]] for group in groups)
    assert padded <= 1.1 * sum(lengths)
    for group in groups:
        area = len(group) * min(64, lengths[group[0]]) * lengths[group[0]]
        assert area <= 1 << 16 or len(group) == 1
    assert grouping.group_lengths([0, 0], max_area=1, block_rows=1) == []
    assert grouping.group_lengths([7, 7], max_area=1, block_rows=64) == [[0], [1]]


def test_buckets_beyond_the_cache_are_recomputed(monkeypatch):
    torch.manual_seed(0)
    layout = layout_of([30, 70])
    inputs = inputs_of(100, 1, torch.float64, True)
    grad = torch.randn(100, 1, 7, dtype=torch.float64)
    expected = run(hstu_attention_eager, layout, inputs, grad)
    monkeypatch.setattr(grouping, "_BUCKET_CACHE_BYTES", 1000)
    for want, got in zip(expected, run(hstu_attention_eager, layout, inputs, grad), strict=True):
        assert torch.equal(want, got)
    assert next(iter(layout.cache.values())).cached_bytes <= 1000


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="No HSTU attention named 'fast'.*eager"):
        hstu_attention(
            *[torch.zeros(0, 1, 1)] * 3,
            layout_of([]),
            max_length=1,
            position_table=torch.zeros(1),
            implementation="fast",
        )
