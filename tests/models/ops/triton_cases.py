"""Law 5: the Triton kernels of the model ops equal their naive twins; run by test_triton.py in a process of its own."""

import sys
from pathlib import Path

import pytest
import torch
from grzoo.models.ops.hstu_attention import hstu_attention_naive, hstu_attention_triton
from grzoo.models.ops.hstu_attention.triton import hstu_attention_triton as kernel_path
from grzoo.models.ops.keyed_dropout.triton import keyed_dropout_triton
from grzoo.models.ops.norm_gate_dropout.triton import norm_gate_dropout_triton
from grzoo.models.ops.sampled_softmax.triton import sampled_softmax_loss_triton
from grzoo.models.ops.silu_attention import SILU_ATTENTION_FUNCTIONS, Visibility
from grzoo.models.packing import JaggedLayout

sys.path.insert(0, str(Path(__file__).parent))
import test_hstu_attention as attention  # noqa: E402
import test_norm_gate_dropout as norm_gate  # noqa: E402
import test_silu_attention as silu  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = attention.NAMES


def on_device(layout, inputs):
    layout = JaggedLayout(
        layout.cu_seq_lens.to(DEVICE), layout.lengths, layout.timestamps.to(DEVICE), layout.target_timestamps.to(DEVICE)
    )
    return layout, [None if x is None else x.detach().to(DEVICE).requires_grad_() for x in inputs]


def compare(lengths, heads, with_time, tolerance=3e-5, dtype=torch.float32, change_times=None, **shape):
    torch.manual_seed(0)
    layout = attention.layout_of(lengths)
    if change_times is not None:
        layout.timestamps, layout.target_timestamps = change_times(layout.timestamps, layout.target_timestamps)
    inputs = attention.inputs_of(layout.num_tokens, heads, torch.float32, with_time, **shape)
    grad = torch.randn(layout.num_tokens, heads, inputs[2].shape[2])
    expected = attention.run(hstu_attention_naive, layout, inputs, grad)
    low = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    got = attention.run(hstu_attention_triton, *on_device(layout, low), grad.to(DEVICE, dtype))
    for name, want, found in zip(NAMES, expected, got, strict=False):
        assert found.dtype == dtype and found.shape == want.shape, name
        assert torch.isfinite(found).all(), name
        scale = want.abs().max().clamp_min(1e-9) if want.numel() else 1
        error = ((found.cpu().float() - want) / scale).abs().max().item() if want.numel() else 0.0
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("with_time", [True, False], ids=["time", "no_time"])
@pytest.mark.parametrize(
    "lengths, heads", [([0, 1, 17, 33, 0, 64, 2], 2), ([70], 1), ([1], 3), ([], 1), ([0, 0], 2)], ids=str
)
def test_attention_equals_naive(lengths, heads, with_time):
    compare(lengths, heads, with_time)


def test_attention_with_wide_heads_and_unequal_widths():
    compare([19, 5], 1, True, dqk=80, dv=24)


# On a GPU several tiles of a sequence too; interpreted they would take minutes.
@pytest.mark.parametrize("lengths", [[40, 0, 7], *([[140, 65, 129]] if DEVICE == "cuda" else [])], ids=str)
def test_attention_in_bf16_is_close(lengths):
    compare(lengths, 2, True, tolerance=0.02, dtype=torch.bfloat16)


def test_times_beyond_31_bits_have_their_buckets_too():
    compare([30, 4], 1, True, change_times=lambda a, b: (a * 100_000 - 2**45, b * 100_000 - 2**45))


def test_times_at_the_boundaries_of_buckets():
    from grzoo.models.ops.hstu_attention.host import bucket_thresholds

    edges = bucket_thresholds(129)[:60]
    times = torch.cat([edges, edges - 1])  # differences to 0, the first time
    compare([120], 1, True, change_times=lambda a, b: (torch.zeros_like(times), times))


def test_attention_takes_views_with_strides_and_gives_the_same_bits_again():
    torch.manual_seed(0)
    layout, (packed, position, time) = on_device(
        attention.layout_of([21, 6]), [torch.randn(27, 3, 2, 8), torch.randn(2 * attention.N - 1), torch.randn(129)]
    )
    q, k, v = packed.unbind(1)
    results = []
    for _ in range(2):
        arguments = dict(max_length=attention.N, position_table=position, time_table=time)
        out = hstu_attention_triton(q, k, v, layout, **arguments)
        results.append([out, *torch.autograd.grad(out.square().sum(), [packed, position, time])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    want = hstu_attention_naive(q, k, v, layout, **arguments)
    torch.testing.assert_close(results[0][0], want, atol=1e-6, rtol=1e-5)


def test_memory_that_was_not_written_does_not_leak(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        compare([5, 0, 33, 3], 2, True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_the_kernel_cannot_take_is_refused():
    layout = attention.layout_of([3])
    q, k, v, position, time = attention.inputs_of(3, 1, torch.float64, True)
    with pytest.raises(ValueError, match="at most 32 bits, got torch.float64"):
        kernel_path(q, k, v, layout, max_length=3, position_table=position)
    q, k, v = (x.float().to(DEVICE) for x in (q, k, v))
    with pytest.raises(ValueError, match="A sequence has 3 tokens, but max_length is 2"):
        kernel_path(q, k, v, layout, max_length=2, position_table=position)
    layout.timestamps = None
    with pytest.raises(ValueError, match="needs timestamps"):
        kernel_path(q, k, v, layout, max_length=3, position_table=position, time_table=time.float())


def test_tensors_of_another_size_are_refused():
    """The kernels would read beyond them."""
    layout, x, keys = attention.layout_of([3]), torch.ones(3, 4, device=DEVICE), torch.ones(1, dtype=torch.int64)
    layout = JaggedLayout(layout.cu_seq_lens.to(DEVICE), layout.lengths)
    q, few, keys, table = x.view(3, 2, 2), x[:2].view(2, 2, 2), keys.to(DEVICE), torch.ones(5, device=DEVICE)
    for tensors, name in (((few, q, q), "query"), ((q, few, q), "key"), ((q, q, few), "value")):
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            kernel_path(*tensors, layout, max_length=3, position_table=table)
    with pytest.raises(ValueError, match="position_table must have shape"):
        kernel_path(q, q, q, layout, max_length=3, position_table=table[:4])
    for short in ("query_times", "key_times", "divisors"):
        times = {name: keys if name == short else keys.repeat(3) for name in ("query_times", "key_times", "divisors")}
        divisors = times.pop("divisors")
        with pytest.raises(ValueError, match=f"{short} must have shape"):
            SILU_ATTENTION_FUNCTIONS["triton"](q, q, q, layout, Visibility(**times), divisors=divisors)
    with pytest.raises(ValueError, match="token_keys must have shape"):
        keyed_dropout_triton(x, 0.5, keys, 0)
    with pytest.raises(ValueError, match="token_keys must have shape"):
        norm_gate_dropout_triton(x, x, eps=1e-6, p=0.5, token_keys=keys)
    with pytest.raises(ValueError, match="gate must have shape"):
        norm_gate_dropout_triton(x, x[:2], eps=1e-6)
    with pytest.raises(ValueError, match="positive_index must have shape"):
        sampled_softmax_loss_triton(x, x, keys, keys.expand(3, 2), keys.bool().expand(3, 2), temperature=1.0)


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("tokens, columns", [(0, 5), (3, 8), (7, 50), (70, 33), (2, 257)])
def test_norm_gate_dropout_equals_naive(tokens, columns, dropout):
    def on_kernel(x, gate, *, token_keys=None, **arguments):
        keys = None if token_keys is None else token_keys.to(DEVICE)
        return norm_gate_dropout_triton(x.to(DEVICE), gate.to(DEVICE), token_keys=keys, **arguments).cpu()

    norm_gate.compare(on_kernel, tokens, columns, dropout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("tokens, columns", [(0, 5), (3, 8), (70, 33), (2, 257)])
def test_keyed_dropout_equals_naive(tokens, columns, p, dtype):
    from grzoo.models.ops import keyed_dropout_naive

    keys = torch.randint(-(2**63), 2**63 - 1, (tokens,), generator=torch.Generator().manual_seed(0))
    wide = torch.randn(columns, tokens).to(dtype)
    results = []
    for function, device in ((keyed_dropout_naive, "cpu"), (keyed_dropout_triton, DEVICE)):
        x = wide.to(device).T.requires_grad_()  # rows that are not dense
        out = function(x, p, keys.to(device), 3)
        results.append([result.cpu() for result in (out, *torch.autograd.grad(out.float().square().sum(), x))])
    for want, got in zip(*results, strict=True):
        assert got.dtype == dtype and torch.equal(want == 0, got == 0)
        torch.testing.assert_close(got, want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("mask", silu.MASKS)
@pytest.mark.parametrize("lengths", [[0, 1, 17, 40, 0, 33], [70], []], ids=str)
def test_silu_attention_equals_naive(lengths, mask):
    torch.manual_seed(0)
    visibility, inputs = silu.MASKS[mask](lengths), silu.inputs_of(sum(lengths), 2, torch.float32)
    grad = torch.randn(sum(lengths), 2, 7)
    expected = silu.run(silu.silu_attention_naive, lengths, visibility, inputs, grad, 0.4)

    def on_kernel(q, k, v, layout, visibility, *, divisors, scale):
        layout = JaggedLayout(layout.cu_seq_lens.to(DEVICE), layout.lengths)
        times = visibility.query_times.to(DEVICE), visibility.key_times.to(DEVICE), visibility.max_distance
        moved = (x.to(DEVICE) for x in (q, k, v))
        attend = SILU_ATTENTION_FUNCTIONS["triton"]
        return attend(*moved, layout, silu.Visibility(*times), divisors=divisors.to(DEVICE), scale=scale).cpu()

    found = silu.run(on_kernel, lengths, visibility, inputs, grad, 0.4)
    for name, want, got in zip(silu.NAMES, expected, found, strict=True):
        error = ((got - want) / (want.abs().max().clamp_min(1e-9) if want.numel() else 1)).abs()
        assert not error.numel() or error.max() <= 1e-5, name


@pytest.mark.parametrize(
    "tokens, negatives, unique, width", [(0, 4, 3, 5), (1, 1, 2, 1), (40, 6, 9, 50), (3, 70, 100, 33)]
)
def test_sampled_softmax_equals_naive(tokens, negatives, unique, width):
    from grzoo.models.ops.sampled_softmax import sampled_softmax_loss_naive

    torch.manual_seed(0)
    query, rows = (torch.randn(n, width, requires_grad=True) for n in (tokens, unique))
    positive, negative = torch.randint(0, unique, (tokens,)), torch.randint(0, unique, (tokens, negatives))
    call = positive, negative, negative == positive.unsqueeze(1)
    wide = [x.detach().double().requires_grad_() for x in (query, rows)]
    want = sampled_softmax_loss_naive(*wide, *call, temperature=0.05)
    moved = [x.to(DEVICE) for x in (query, rows, *call)]
    got = sampled_softmax_loss_triton(*moved, temperature=0.05).cpu()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    expected, found = torch.autograd.grad(want, wide), torch.autograd.grad(got, [query, rows])
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=2e-4)
    again = torch.autograd.grad(sampled_softmax_loss_triton(*moved, temperature=0.05).cpu(), [query, rows])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
