"""Law 5: the C++ silu attention equals its naive twin under each mask, every gradient; law 1: for any threads."""

import sys
from pathlib import Path

import pytest
import torch
from grzoo.models.ops.host import attention_call, available
from grzoo.models.ops.silu_attention import Visibility, silu_attention_auto, silu_attention_host
from grzoo.models.ops.silu_attention.naive import silu_attention_naive

sys.path.insert(0, str(Path(__file__).parent))
from test_silu_attention import LENGTHS, MASKS, NAMES, dynamic, inputs_of, layout_of, run  # noqa: E402

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler")


def shuffled(lengths):
    """Times in no order, with ties: nothing is causal."""
    times = torch.randint(-50, 50, (sum(lengths),))
    return Visibility(times, torch.randint(-50, 50, (sum(lengths),)), 30)


ALL_MASKS = MASKS | {"shuffled": shuffled}


def assert_close(expected, got, tolerance=1e-5):
    for name, want, ours in zip(NAMES, expected, got, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == want.shape, name
        norm = want.abs().max().clamp_min(1e-9) if want.numel() else 1
        torch.testing.assert_close(
            ours.double() / norm, want.double() / norm, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("mask", ALL_MASKS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_host_equals_naive(lengths, mask, level, monkeypatch):
    monkeypatch.setattr(attention_call, "HIGHEST_LEVEL", level)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: empty(*size, **kw).fill_(torch.nan))
    torch.manual_seed(0)
    heads, scale = (1, 1.0) if mask == "causal" else (3, 0.4)
    visibility, inputs = ALL_MASKS[mask](lengths), inputs_of(sum(lengths), heads, torch.float32)
    grad = torch.randn(sum(lengths), heads, 7)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = run(silu_attention_naive, lengths, visibility, wide, grad.double(), scale)
    assert_close(expected, run(silu_attention_host, lengths, visibility, inputs, grad, scale))


@pytest.mark.parametrize("mask", ["dynamic", "near", "shuffled"])
def test_long_sequences_in_several_units(mask):
    torch.manual_seed(0)
    lengths = [1100, 1, 490]
    visibility, inputs, grad = ALL_MASKS[mask](lengths), inputs_of(1591, 2, torch.float32), torch.randn(1591, 2, 7)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = run(silu_attention_naive, lengths, visibility, wide, grad.double(), 0.5)
    assert_close(expected, run(silu_attention_host, lengths, visibility, inputs, grad, 0.5))


@pytest.mark.parametrize("width", [8, 20, 64])
def test_strided_views_of_one_projection(width):
    """The layers hand over slices of one product: rows of any stride."""
    torch.manual_seed(0)
    whole = torch.randn(40, 3 * 2 * width)
    parts = [x.unflatten(1, (2, width)).detach() for x in whole.chunk(3, 1)]
    visibility, layout = dynamic([40]), layout_of([40])
    args = (layout, visibility)
    got = silu_attention_host(*parts, *args, divisors=torch.ones(40))
    want = silu_attention_naive(*(x.double() for x in parts), *args, divisors=torch.ones(40))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads):
    torch.manual_seed(0)
    lengths = [700, 3, 0, 40, 1000, 97]
    visibility, inputs, grad = dynamic(lengths), inputs_of(1840, 2, torch.float32), torch.randn(1840, 2, 7)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(silu_attention_host, lengths, visibility, inputs, grad, 0.5)
        torch.set_num_threads(threads)
        together = run(silu_attention_host, lengths, visibility, inputs, grad, 0.5)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))


def test_a_nan_reaches_those_who_see_it_and_no_one_else():
    torch.manual_seed(0)
    lengths = [60]
    visibility, inputs = MASKS["causal"](lengths), inputs_of(60, 1, torch.float32)
    with torch.no_grad():
        inputs[2][50] = torch.nan
        out = silu_attention_host(*inputs, layout_of(lengths), visibility, divisors=torch.ones(60))
    assert out[50:].isnan().all() and out[:48].isfinite().all()  # 48: a tile is computed as a whole


def test_auto_takes_it_in_low_precision_too():
    torch.manual_seed(0)
    lengths = [5, 0, 90, 3]
    visibility, grad = dynamic(lengths), torch.randn(98, 2, 7).bfloat16()
    low = [x.detach().bfloat16().requires_grad_() for x in inputs_of(98, 2, torch.float32)]
    expected = run(silu_attention_naive, lengths, visibility, [x.float() for x in low], grad.float(), 1.0)
    for name, want, got in zip(
        NAMES, expected, run(silu_attention_auto, lengths, visibility, low, grad, 1.0), strict=True
    ):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).abs().max() <= 0.02 * want.abs().max(), name


def test_float64_is_refused():
    inputs = inputs_of(3, 1, torch.float64)
    with pytest.raises(ValueError, match="float64"):
        silu_attention_host(*inputs, layout_of([3]), dynamic([3]), divisors=torch.ones(3))


def test_registered_with_torch():
    inputs, visibility, layout = inputs_of(9, 2, torch.float32), dynamic([5, 4]), layout_of([5, 4])
    times = (layout.cu_seq_lens, visibility.query_times, visibility.key_times, torch.ones(9))
    torch.library.opcheck(torch.ops.grzoo.silu_attention_host.default, (*inputs, *times, -1, 0.5))
