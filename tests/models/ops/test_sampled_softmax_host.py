"""Law 5: the C++ sampled softmax equals its naive twin, loss and gradients; law 1: for any number of threads."""

import pytest
import torch
from grzoo.models.ops import sampled_softmax_loss, sampled_softmax_loss_host, sampled_softmax_loss_naive
from grzoo.models.ops.host import available
from grzoo.models.ops.sampled_softmax import host

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler")
SHAPES = [(37, 20, 50, 128), (300, 1000, 7, 5), (3, 5, 33, 0), (0, 5, 8, 4), (1, 1, 1, 3), (130, 50, 256, 17)]


def inputs_of(tokens, rows, width, negatives, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, table = torch.randn(tokens, width, generator=generator), torch.randn(rows, width, generator=generator)
    positive = torch.randint(0, rows, (tokens,), generator=generator)
    negative = torch.randint(0, rows, (tokens, negatives), generator=generator)
    return [query, table, positive, negative, negative == positive.unsqueeze(1)]


def run(function, inputs, factor=0.5):
    query, rows = (x.detach().requires_grad_() for x in inputs[:2])
    loss = function(query, rows, *inputs[2:], temperature=0.05)
    return [loss.detach(), *torch.autograd.grad(loss * factor, [query, rows])]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_host_equals_naive(shape, level, monkeypatch):
    monkeypatch.setattr(host, "HIGHEST_LEVEL", level)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: empty(*size, **kw).fill_(torch.nan))
    inputs = inputs_of(*shape)
    expected = run(sampled_softmax_loss_naive, [x.double() if x.is_floating_point() else x for x in inputs])
    for name, want, got in zip(
        ("loss", "query", "rows"), expected, run(sampled_softmax_loss_host, inputs), strict=True
    ):
        assert got.dtype == torch.float32 and got.shape == want.shape, name
        scale = want.abs().max().clamp_min(1e-6) if want.numel() else 1
        torch.testing.assert_close(
            got.double() / scale, want / scale, atol=3e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_rows_and_queries_below_the_floor_of_the_norm():
    inputs = inputs_of(20, 9, 6, 12)
    inputs[0][3], inputs[1][4], inputs[0][5], inputs[1][6] = 0.0, 0.0, 1e-8, -1e-8
    expected = run(sampled_softmax_loss_naive, inputs)
    for want, got in zip(expected, run(sampled_softmax_loss_host, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads):
    inputs = inputs_of(700, 3000, 50, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(sampled_softmax_loss_host, inputs)
        torch.set_num_threads(threads)
        together = run(sampled_softmax_loss_host, inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))


def test_negatives_that_are_the_positive_count_nothing():
    inputs = inputs_of(6, 4, 8, 10)
    inputs[3] = inputs[2].unsqueeze(1).expand(6, 10).contiguous()
    inputs[4] = torch.ones(6, 10, dtype=torch.bool)
    loss, *grads = run(sampled_softmax_loss_host, inputs)
    assert loss == 0 and all(not grad.any() for grad in grads)


def test_without_gradients_and_by_the_common_door():
    inputs = inputs_of(50, 30, 12, 20)
    with torch.no_grad():
        assert sampled_softmax_loss_host(*inputs, temperature=0.1) == sampled_softmax_loss(*inputs, temperature=0.1)
    half = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
    grads = run(sampled_softmax_loss, half)
    assert grads[1].dtype == torch.bfloat16 and grads[0].dtype == torch.float32


def test_a_nan_reaches_the_loss():
    inputs = inputs_of(5, 4, 8, 3)
    inputs[0][2, 1] = torch.nan
    assert run(sampled_softmax_loss_host, inputs)[0].isnan()


def test_refusals():
    inputs = inputs_of(5, 4, 8, 3)
    with pytest.raises(ValueError, match="float64"):
        sampled_softmax_loss_host(inputs[0].double(), *inputs[1:], temperature=0.1)
    for bad in (4, -1, 2**40):
        inputs[3][1, 1] = bad
        with pytest.raises(ValueError, match="4 rows"):
            sampled_softmax_loss_host(*inputs, temperature=0.1)


def test_registered_with_torch():
    inputs = inputs_of(5, 4, 8, 3)
    for with_grads in (True, False):
        torch.library.opcheck(
            torch.ops.grzoo.sampled_softmax_host.default, (*inputs, 0.1, with_grads),
            test_utils=["test_schema", "test_faketensor"],
        )  # fmt: skip
