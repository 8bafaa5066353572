"""Law 5: softmax attention over packed sequences equals its naive twin, forward and every gradient."""

import pytest
import torch
from grzoo.models.ops import softmax_attention, softmax_attention_grouped, softmax_attention_naive
from grzoo.models.ops.softmax_attention import softmax_attention_varlen
from grzoo.models.packing import JaggedLayout

LENGTHS = [[], [0], [1], [5, 0, 1, 64, 2, 2, 63], [200, 7, 130], list(range(40))]


def layout_of(lengths):
    return JaggedLayout.from_cu_seq_lens(torch.tensor([0, *lengths]).cumsum(0), sum(lengths))


def inputs(lengths, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(sum(lengths), 2, 3, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_groups_equal_naive(dtype, tolerance, lengths):
    qkv, layout = inputs(lengths, dtype), layout_of(lengths)
    grad = torch.randn(sum(lengths), 2, 3, dtype=dtype)
    results = []
    for function in (softmax_attention_naive, softmax_attention_grouped):
        out = function(*qkv, layout)
        results.append([out, *torch.autograd.grad(out, qkv, grad)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_the_dense_form_of_one_sequence():
    (q, k, v), layout = inputs([9]), layout_of([9])
    q, k, v = (x.detach() for x in (q, k, v))
    for head in range(2):
        for row in range(9):
            weights = torch.softmax(k[: row + 1, head] @ q[row, head] / 3**0.5, 0)
            torch.testing.assert_close(softmax_attention(q, k, v, layout)[row, head], weights @ v[: row + 1, head])


def test_padding_is_at_most_an_eighth_of_a_group():
    lengths = torch.randint(8, 200, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    layout = layout_of(lengths)
    softmax_attention(*inputs(lengths), layout)
    places = layout.cache["softmax_attention"].tokens.numel()
    assert sum(lengths) <= places < 1.15 * sum(lengths)


def test_bfloat16_is_computed_in_float32():
    qkv, layout = [x.detach().bfloat16() for x in inputs([30, 4])], layout_of([30, 4])
    got, want = softmax_attention(*qkv, layout), softmax_attention_naive(*qkv, layout)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


def test_packed_flash_attention_refuses_a_cpu():
    with pytest.raises(ValueError, match="float32 on cpu"):
        softmax_attention_varlen(*inputs([3]), layout_of([3]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packed_flash_attention_equals_naive():
    lengths = [200, 7, 130, 1]
    qkv = [torch.randn(sum(lengths), 2, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    layout = JaggedLayout.from_cu_seq_lens(starts, sum(lengths))
    results = []
    for function in (softmax_attention_naive, softmax_attention_varlen):
        out = function(*qkv, layout)
        results.append([out, *torch.autograd.grad(out.float().sum(), qkv)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
