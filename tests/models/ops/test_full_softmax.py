"""Law 5: the full softmax in chunks equals its naive twin, forward and every gradient."""

import sys

import pytest
import torch
from grzoo.models.ops import full_softmax_loss, full_softmax_loss_naive

MODULE = sys.modules["grzoo.models.ops.full_softmax.chunked"]


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
@pytest.mark.parametrize("tokens, items, width", [(0, 4, 3), (1, 1, 1), (23, 9, 5), (7, 130, 4)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_equals_naive(dtype, tolerance, tokens, items, width, chunk, monkeypatch):
    monkeypatch.setitem(MODULE._CHUNK_ELEMENTS, "cpu", chunk)
    torch.manual_seed(0)
    query = (3 * torch.randn(tokens, width, dtype=dtype)).requires_grad_()
    rows = torch.randn(items, width, dtype=dtype, requires_grad=True)
    target = torch.randint(0, items, (tokens,))
    for scale in (1.0, 0.25):
        got, want = (f(query, rows, target) for f in (full_softmax_loss, full_softmax_loss_naive))
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
        pairs = zip(*(torch.autograd.grad(x * scale, (query, rows)) for x in (got, want)), strict=True)
        for ours, naive in pairs:
            torch.testing.assert_close(ours, naive, atol=10 * tolerance, rtol=10 * tolerance)


def test_large_logits_stay_finite():
    query = torch.tensor([[1e3, 0.0]], requires_grad=True)
    loss = full_softmax_loss(query, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e3) and query.grad.isfinite().all()


def test_memory_holds_one_chunk_of_logits(monkeypatch):
    """No [tokens, items] tensor: the largest allocation is a chunk."""
    monkeypatch.setitem(MODULE._CHUNK_ELEMENTS, "cpu", 1000)
    query, rows = torch.randn(200, 2, requires_grad=True), torch.randn(500, 2, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        full_softmax_loss(query, rows, torch.zeros(200, dtype=torch.long)).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 10 * 4 * 1000
