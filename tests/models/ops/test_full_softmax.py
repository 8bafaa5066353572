"""Law 5: the full softmax in chunks equals its naive twin; law 1: its C++ pass has the same bits for any threads."""

import pytest
import torch
from grzoo.models.ops import full_softmax_loss, full_softmax_loss_naive
from grzoo.models.ops.full_softmax import chunked, host
from grzoo.models.ops.host import available

PASSES = ["torch", 0, 1]  # without a compiler, and the instruction sets of the C++ pass


@pytest.fixture(params=PASSES)
def softmax_pass(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(chunked, "available", lambda: False)
    elif not available():
        pytest.skip("no C++ compiler")
    else:
        monkeypatch.setattr(host, "HIGHEST_LEVEL", request.param)


def run(function, query, rows, target, factor=1.0):
    query, rows = (x.detach().requires_grad_() for x in (query, rows))
    loss = function(query, rows, target)
    return [loss.detach(), *torch.autograd.grad(loss * factor, [query, rows])]


@pytest.mark.parametrize("chunk", [1, 3, 4096])
@pytest.mark.parametrize("tokens, items, width", [(0, 4, 3), (1, 1, 1), (23, 9, 5), (7, 130, 4), (5, 33, 70)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_equals_naive(softmax_pass, dtype, tolerance, tokens, items, width, chunk, monkeypatch):
    monkeypatch.setattr(chunked, "_MIN_CHUNK", chunk)
    monkeypatch.setitem(chunked._CHUNK_ELEMENTS, "cpu", 1)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *size, **kw: empty(*size, **kw).fill_(torch.nan))
    torch.manual_seed(0)
    query, rows = 3 * torch.randn(tokens, width, dtype=dtype), torch.randn(items, width, dtype=dtype)
    target = torch.randint(0, items, (tokens,))
    for scale in (1.0, 0.25):
        pairs = zip(
            ("loss", "query", "items"),
            run(full_softmax_loss, query, rows, target, scale),
            run(full_softmax_loss_naive, query, rows, target, scale),
            strict=True,
        )
        for name, got, want in pairs:
            torch.testing.assert_close(
                got, want, atol=10 * tolerance, rtol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_large_logits_stay_finite(softmax_pass):
    query = torch.tensor([[1e3, 0.0]], requires_grad=True)
    loss = full_softmax_loss(query, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e3) and query.grad.isfinite().all()


@pytest.mark.parametrize("place", [0, 36, 39])
def test_a_nan_reaches_the_loss(softmax_pass, place):
    rows = torch.randn(40, 6)
    rows[place, 2] = torch.nan
    assert full_softmax_loss(torch.randn(5, 6), rows, torch.zeros(5, dtype=torch.long)).isnan()


@pytest.mark.skipif(not available(), reason="no C++ compiler")
def test_threads_do_not_change_a_bit_of_the_pass():
    logits = 5 * torch.randn(37, 1003)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            weights = logits.clone()
            results.append((weights, *host.exponentiate_host(weights)))
    finally:
        torch.set_num_threads(before)
    for got in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(got, results[0], strict=True))


def test_twice_the_same_bits(softmax_pass):
    query, rows, target = torch.randn(150, 8), torch.randn(600, 8), torch.randint(0, 600, (150,))
    once, again = (run(full_softmax_loss, query, rows, target) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_memory_holds_one_chunk_of_logits(monkeypatch):
    """No [tokens, items] tensor: the largest allocation is a chunk."""
    monkeypatch.setattr(chunked, "_MIN_CHUNK", 2)
    monkeypatch.setitem(chunked._CHUNK_ELEMENTS, "cpu", 1000)
    query, rows = torch.randn(200, 2, requires_grad=True), torch.randn(500, 2, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        full_softmax_loss(query, rows, torch.zeros(200, dtype=torch.long)).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 10 * 4 * 1000


@pytest.mark.parametrize("bad", [-1, 9])
def test_a_target_without_a_row_is_refused(bad):
    with pytest.raises(ValueError, match=f"got {bad}, there are 9 rows"):
        full_softmax_loss(torch.randn(2, 3), torch.randn(9, 3), torch.tensor([0, bad]))


def test_without_gradients_and_half_precision():
    query, rows, target = torch.randn(20, 8), torch.randn(30, 8), torch.randint(0, 30, (20,))
    with torch.no_grad():
        alone = full_softmax_loss(query, rows, target)
    assert alone == run(full_softmax_loss, query, rows, target)[0]
    grads = run(full_softmax_loss, query.bfloat16(), rows, target)[1:]
    assert grads[0].dtype == torch.bfloat16 and grads[1].dtype == torch.float32


def test_registered_with_torch():
    inputs = (torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 6, 3, 3, 2]))
    for with_grads in (True, False):
        torch.library.opcheck(
            torch.ops.grzoo.full_softmax.default, (*inputs, with_grads), test_utils=["test_schema", "test_faketensor"]
        )
