"""Law 5: LayerNorm, gate and dropout in one equal their naive twin, forward and gradients, the mask bit for bit."""

import pytest
import torch
from grzoo.models.ops import norm_gate_dropout, norm_gate_dropout_naive
from grzoo.models.ops.host import available
from grzoo.models.ops.norm_gate_dropout import norm_gate_dropout_eager, norm_gate_dropout_host

EPS = 1e-6
needs_compiler = pytest.mark.skipif(not available(), reason="no C++ compiler")
SHAPES = [(0, 5), (1, 1), (3, 8), (7, 50), (600, 33), (5, 257)]


def inputs_of(tokens, columns, dtype=torch.float32):
    torch.manual_seed(tokens + columns)
    packed = torch.randn(tokens, 3 * columns, dtype=dtype)  # the gate is a strided view in the model
    x, gate, grad = (packed[:, k * columns : (k + 1) * columns] for k in range(3))
    return x.clone().requires_grad_(), gate.requires_grad_(), grad, torch.randint(-(2**63), 2**63 - 1, (tokens,))


def run(function, x, gate, grad, **arguments):
    out = function(x, gate, eps=EPS, **arguments)
    return [out, *torch.autograd.grad(out, [x, gate], grad)]


def compare(function, tokens, columns, dropout, tolerance=2e-6):
    x, gate, grad, keys = inputs_of(tokens, columns)
    arguments = dict(p=0.3, token_keys=keys, site=4) if dropout else {}
    expected = run(
        norm_gate_dropout_naive, *(a.detach().double().requires_grad_() for a in (x, gate)), grad, **arguments
    )
    for name, want, got in zip(("y", "dx", "dgate"), expected, run(function, x, gate, grad, **arguments), strict=True):
        scale = want.abs().amax(1, keepdim=True).clamp_min(1.0)
        if columns == 1 and name == "dx":
            scale = scale * 1e3  # the variance is zero: 1 / sqrt(eps) is all there is
        torch.testing.assert_close(
            got.double() / scale, want / scale, atol=tolerance, rtol=0, msg=lambda m, n=name: n + m
        )
        assert torch.equal(got == 0, want.float() == 0) or not dropout or name == "dx"


@needs_compiler
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("tokens, columns", SHAPES)
def test_host_equals_naive(tokens, columns, dropout):
    compare(norm_gate_dropout_host, tokens, columns, dropout)


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("tokens, columns", SHAPES[1:])
def test_eager_equals_naive(tokens, columns, dropout):
    compare(norm_gate_dropout_eager, tokens, columns, dropout, tolerance=1e-5)


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits():
    x, gate, grad, keys = inputs_of(1500, 40)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(run(norm_gate_dropout_host, x, gate, grad, p=0.5, token_keys=keys, site=1))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_compiler
def test_bf16_takes_a_path_that_can_do_it_and_the_host_path_says_no():
    x, gate, _, _ = inputs_of(4, 6)
    low = norm_gate_dropout(x.bfloat16(), gate.bfloat16(), eps=EPS)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), norm_gate_dropout_naive(x, gate, eps=EPS), atol=0.05, rtol=0.05)
    with pytest.raises(ValueError, match="float32 CPU tensors, got torch.bfloat16"):
        norm_gate_dropout_host(x.bfloat16(), gate.bfloat16(), eps=EPS)
