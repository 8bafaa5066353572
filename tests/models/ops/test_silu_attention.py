"""Law 5: the eager silu attention equals its naive twin, forward and every gradient, under each mask."""

import itertools

import pytest
import torch
from grzoo.models.ops.silu_attention import (
    ALWAYS,
    NEVER,
    STATIC,
    Visibility,
    silu_attention_auto,
    silu_attention_eager,
    silu_attention_naive,
)
from grzoo.models.packing import JaggedLayout

LENGTHS = {"odd": [0, 1, 17, 3, 0, 130, 65, 64, 2, 63, 128], "one": [1], "no users": [], "no tokens": [0, 0]}
NAMES = ("out", "query", "key", "value")


def layout_of(lengths):
    return JaggedLayout.from_cu_seq_lens(torch.tensor([0, *itertools.accumulate(lengths)]), sum(lengths))


def dynamic(lengths):
    """A third static tokens, a third events with ties in time, a third candidates."""
    query, key = [], []
    for length in lengths:
        times = torch.randint(0, 20, (length,)).sort().values
        kind = torch.arange(length) * 3 // max(1, length)
        query.append(torch.where(kind == 0, STATIC, times))
        key.append(torch.where(kind == 0, ALWAYS, torch.where(kind == 1, times, NEVER)))
    empty = torch.zeros(0, dtype=torch.int64)
    return Visibility(torch.cat([empty, *query]), torch.cat([empty, *key]))


def causal(lengths, max_distance=None):
    positions = torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(n) for n in lengths)])
    return Visibility(positions, positions, max_distance)


MASKS = {
    "dynamic": dynamic,
    "causal": causal,
    "near": lambda lengths: causal(lengths, 5),
    "everything": lambda lengths: Visibility(*(torch.full((sum(lengths),), x) for x in (NEVER, ALWAYS))),
    "nothing": lambda lengths: Visibility(*(torch.full((sum(lengths),), x) for x in (STATIC, NEVER))),
}


def run(function, lengths, visibility, inputs, grad, scale):
    layout = layout_of(lengths)
    divisors = torch.linspace(1, 3, layout.num_tokens)
    out = function(*inputs, layout, visibility, divisors=divisors, scale=scale)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def inputs_of(total, heads, dtype):
    return [torch.randn(total, heads, width, dtype=dtype, requires_grad=True) for width in (5, 5, 7)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_eager_equals_naive(dtype, tolerance, lengths, mask):
    torch.manual_seed(0)
    heads, scale = (1, 1.0) if mask == "causal" else (3, 0.4)
    visibility, inputs = MASKS[mask](lengths), inputs_of(sum(lengths), heads, dtype)
    grad = torch.randn(sum(lengths), heads, 7, dtype=dtype)
    expected = run(silu_attention_naive, lengths, visibility, inputs, grad, scale)
    for name, want, got in zip(
        NAMES, expected, run(silu_attention_eager, lengths, visibility, inputs, grad, scale), strict=True
    ):
        assert got.dtype == dtype and got.shape == want.shape, name
        norm = want.abs().max().clamp_min(1e-9) if want.numel() else 1
        torch.testing.assert_close(got / norm, want / norm, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_naive_equals_the_formula_pair_by_pair():
    torch.manual_seed(0)
    q, k, v = inputs_of(4, 1, torch.float64)
    visibility = Visibility(torch.tensor([STATIC, 5, 9, 5]), torch.tensor([ALWAYS, 5, NEVER, NEVER]))
    sees = {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 3]}  # the last one happens at the same time as token 1
    got = silu_attention_naive(q, k, v, layout_of([4]), visibility, divisors=torch.full((4,), 4.0))
    for i, columns in sees.items():
        want = sum(torch.nn.functional.silu(q[i, 0] @ k[j, 0]) * v[j, 0] for j in columns) / 4
        torch.testing.assert_close(got[i, 0], want)


def test_unwritten_memory_does_not_leak(monkeypatch):
    """torch.empty filled with NaN: the eager path writes all it returns, padded places included."""
    torch.manual_seed(0)
    lengths = [5, 0, 9, 70, 3]
    visibility, inputs, grad = dynamic(lengths), inputs_of(87, 2, torch.float32), torch.randn(87, 2, 7)
    expected = run(silu_attention_auto, lengths, visibility, inputs, grad, 1.0)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        poisoned = run(silu_attention_auto, lengths, visibility, inputs, grad, 1.0)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, want, got in zip(NAMES, expected, poisoned, strict=True):
        assert torch.equal(want, got), name


def test_bf16_is_close():
    torch.manual_seed(0)
    lengths = [5, 0, 9, 130, 3]
    visibility, inputs, grad = dynamic(lengths), inputs_of(147, 2, torch.float32), torch.randn(147, 2, 7)
    expected = run(silu_attention_naive, lengths, visibility, inputs, grad, 1.0)
    low = [x.detach().bfloat16().requires_grad_() for x in inputs]
    for name, want, got in zip(
        NAMES, expected, run(silu_attention_eager, lengths, visibility, low, grad.bfloat16(), 1.0), strict=True
    ):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).abs().max() <= 0.02 * want.abs().max(), name


def test_memory_is_linear_in_tokens():
    """What the graph keeps for backward is packed tokens, no scores."""
    kept = []
    inputs = inputs_of(600, 1, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        silu_attention_eager(*inputs, layout_of([600]), causal([600]), divisors=torch.ones(600))
    assert max(kept) <= 600 * 7
