"""Law 5: sampled softmax equals its naive twin, forward and every gradient, by every method."""

import sys

import pytest
import torch
from grzoo.models.ops import sampled_logits, sampled_logits_naive, sampled_softmax_loss, sampled_softmax_loss_naive
from grzoo.models.ops.sampled_softmax.naive import l2_normalize

MODULE = sys.modules["grzoo.models.ops.sampled_softmax.sampled_logits"]
SHAPES = [(0, 3, 4, 5), (1, 1, 1, 1), (7, 3, 4, 2), (70, 5, 9, 3), (33, 4, 1, 50), (5, 0, 4, 3)]  # T, N, D, U


def both(fast, naive, leaves, grad=None):
    results = []
    for function in (naive, fast):
        out = function()
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out) if grad is None else grad)])
    return zip(*results, strict=True)


@pytest.mark.parametrize("method", ["all_rows", "picked", "gathered", None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_sampled_logits_equal_naive(dtype, tolerance, shape, method, monkeypatch):
    tokens, picks, width, unique = shape
    if method == "gathered":  # what "picked" means on a GPU
        monkeypatch.setattr(MODULE, "_variant", lambda method, query: "gathered")
    monkeypatch.setitem(MODULE._CHUNK_ELEMENTS, "cpu", 100)
    torch.manual_seed(0)
    query = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    rows = torch.randn(unique, width, dtype=dtype, requires_grad=True)
    index = torch.randint(0, unique, (tokens, picks))  # repeats within a row are common
    grad = torch.randn(tokens, picks, dtype=dtype)
    name = "picked" if method == "gathered" else method
    pairs = both(
        lambda: sampled_logits(query, rows, index, method=name),
        lambda: sampled_logits_naive(query, rows, index),
        (query, rows),
        grad,
    )
    for want, got in pairs:
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shared", [False, True], ids=["uniform", "shared"])
@pytest.mark.parametrize("tokens, negatives, unique", [(0, 4, 3), (1, 1, 2), (40, 6, 9), (3, 2, 100)])
def test_loss_equals_naive(tokens, negatives, unique, shared, normalize):
    torch.manual_seed(0)
    query = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(unique, 5, dtype=torch.float64, requires_grad=True)
    positive = torch.randint(0, unique, (tokens,))
    negative = torch.randint(0, unique, (negatives,) if shared else (tokens, negatives))
    arguments = dict(temperature=0.05 if normalize else 1.0, normalize=normalize)
    if shared:
        arguments |= dict(positive_log_q=-5 * torch.rand(tokens), negative_log_q=-5 * torch.rand(negatives))
    call = (query, rows, positive, negative, negative == positive.unsqueeze(1))
    pairs = both(
        lambda: sampled_softmax_loss(*call, **arguments),
        lambda: sampled_softmax_loss_naive(*call, **arguments),
        (query, rows),
    )
    for want, got in pairs:
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_loss_by_hand():
    """One token, cosines 1 (positive), 0 and an accidental hit, temperature 0.5: log(1 + e^-2)."""
    query, rows = torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 7.0]])
    accidental = torch.tensor([[False, True]])
    loss = sampled_softmax_loss(query, rows, torch.tensor([0]), torch.tensor([[1, 0]]), accidental, temperature=0.5)
    torch.testing.assert_close(loss, torch.tensor(0.126928))
    corrected = sampled_softmax_loss(
        query,
        rows,
        torch.tensor([0]),
        torch.tensor([1]),
        torch.tensor([[False]]),
        temperature=0.5,
        positive_log_q=torch.tensor([0.2]).log(),
        negative_log_q=torch.tensor([0.8]).log(),
    )  # e^2 / 0.2 against e^0 / 0.8
    torch.testing.assert_close(corrected, torch.log1p(torch.exp(torch.tensor(-2.0)) * 0.2 / 0.8))


def test_low_precision_queries_are_scored_in_float32():
    torch.manual_seed(0)
    query = torch.randn(9, 8).bfloat16().requires_grad_()
    rows = torch.randn(6, 8, requires_grad=True)
    call = (rows, torch.arange(6).repeat(2)[:9], torch.randint(0, 6, (9, 4)), torch.zeros(9, 4, dtype=torch.bool))
    with torch.autocast("cpu", torch.bfloat16):
        loss = sampled_softmax_loss(query, *call, temperature=0.05)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, sampled_softmax_loss_naive(query, *call, temperature=0.05))
    loss.backward()
    assert query.grad.dtype == torch.bfloat16


def test_zero_vectors_have_finite_gradients():
    query, rows = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    indices = torch.tensor([0, 1]), torch.tensor([[2, 3], [3, 2]])
    sampled_softmax_loss(query, rows, *indices, torch.zeros(2, 2, dtype=torch.bool), temperature=0.05).backward()
    assert query.grad.isfinite().all() and rows.grad.isfinite().all()
    assert torch.equal(l2_normalize(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_the_same_call_twice_is_bit_equal():
    torch.manual_seed(0)
    query, rows = torch.randn(50, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    index, grad = torch.randint(0, 30, (50, 6)), torch.randn(50, 6)
    for method in ("all_rows", "picked"):
        out = [sampled_logits(query, rows, index, method=method) for _ in range(2)]
        first, second = (torch.autograd.grad(o, (query, rows), grad) for o in out)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
