"""Law 5: the C++ attention equals its naive twin, forward and every gradient; law 1: for any number of threads."""

import functools
import itertools

import pytest
import torch
from grzoo.models.ops import hstu_attention, hstu_attention_eager, hstu_attention_host, hstu_attention_naive
from grzoo.models.ops.host import attention_call, available, library
from grzoo.models.ops.hstu_attention import host
from grzoo.models.ops.hstu_attention.bias import time_buckets
from grzoo.models.packing import JaggedLayout

N = 1100
LENGTHS = {
    "odd": [0, 1, 17, 3, 0, 130, 48, 47, 49, 2, 96, 97],
    "long, several units": [1001, 5, 481],
    "one": [1],
    "no users": [],
    "no tokens": [0, 0],
}
NAMES = ("out", "query", "key", "value", "position_table", "time_table")
TIMES = ("ordered", "unordered", "wide")

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler")


def layout_of(lengths, times="ordered"):
    """Times that take each path of the buckets: sorted, shuffled, and further apart than 31 bits."""
    total = sum(lengths)
    events, targets = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for length in lengths:
        time = (torch.rand(length + 1, dtype=torch.float64) ** 6 * 1e9).long() + 10**9
        time = time * 10**6 if times == "wide" else time
        time = time if times == "unordered" else time.sort().values
        events.append(time[:-1])
        targets.append(time[1:])
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    return JaggedLayout.from_cu_seq_lens(
        starts, total, timestamps=torch.cat(events), target_timestamps=torch.cat(targets)
    )


def inputs_of(total, heads, dqk, dv, with_time=True):
    shapes = [(total, heads, dqk), (total, heads, dqk), (total, heads, dv), (2 * N - 1,), (129,)]
    tensors = [torch.randn(shape) for shape in shapes]
    return tensors if with_time else [*tensors[:4], None]


def run(function, layout, inputs, grad):
    layout.cache.clear()
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    query, key, value, position, time = leaves
    out = function(query, key, value, layout, max_length=N, position_table=position, time_table=time)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], grad)]


def assert_close(got, want, tolerance, name=""):
    assert got.shape == want.shape, name
    scale = want.abs().max().clamp_min(1e-9) if want.numel() else 1
    torch.testing.assert_close(
        got.double() / scale, want.double() / scale, atol=tolerance, rtol=0, msg=lambda m: f"{name}: {m}"
    )


def check_against_naive(layout, inputs, value_width, tolerance=3e-6):
    grad = torch.randn(layout.num_tokens, inputs[0].shape[1], value_width)
    wide = [None if x is None else x.double() for x in inputs]
    expected = run(hstu_attention_naive, layout, wide, grad.double())
    for name, want, got in zip(NAMES, expected, run(hstu_attention_host, layout, inputs, grad), strict=False):
        assert got.dtype == torch.float32, name
        assert_close(got, want, tolerance, name)


@pytest.fixture
def poisoned(monkeypatch):
    """Every new float tensor starts as NaN, so that an element that is not written shows."""
    empty = torch.empty

    def empty_of_nan(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty_of_nan)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    "heads, with_time, times", [(1, True, "ordered"), (3, True, "unordered"), (2, False, "ordered")]
)
@pytest.mark.parametrize("level", [0, 1])
def test_host_equals_naive(lengths, heads, with_time, times, level, monkeypatch, poisoned):
    monkeypatch.setattr(attention_call, "HIGHEST_LEVEL", level)
    torch.manual_seed(0)
    layout = layout_of(lengths, times)
    check_against_naive(layout, inputs_of(layout.num_tokens, heads, 25, 50, with_time), 50)


@pytest.mark.parametrize("dqk, dv", [(1, 1), (7, 3), (16, 8), (50, 50), (64, 40), (128, 72), (256, 256)])
def test_head_dimensions(dqk, dv, poisoned):
    torch.manual_seed(1)
    layout = layout_of([53, 0, 100], "wide")
    check_against_naive(layout, inputs_of(layout.num_tokens, 2, dqk, dv), dv)


def test_views_of_one_projection():
    """Query, key and value are slices of one tensor in the model: strides are followed, not copied."""
    torch.manual_seed(2)
    layout = layout_of([60, 7])
    *_, position, time = inputs_of(67, 2, 5, 5)
    whole = torch.randn(67, 60)
    views = [x.unflatten(-1, (2, -1)) for x in whole.split(20, dim=-1)]
    got = run(hstu_attention_host, layout, [*views, position, time], grad := torch.randn(67, 2, 10))
    want = run(hstu_attention_host, layout, [*(x.contiguous() for x in views), position, time], grad)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads):
    torch.manual_seed(3)
    layout = layout_of(LENGTHS["odd"] + LENGTHS["long, several units"])
    inputs, grad = inputs_of(layout.num_tokens, 2, 25, 16), torch.randn(layout.num_tokens, 2, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(hstu_attention_host, layout, inputs, grad)
        torch.set_num_threads(threads)
        together = run(hstu_attention_host, layout, inputs, grad)
    finally:
        torch.set_num_threads(before)
    for name, want, got in zip(NAMES, alone, together, strict=True):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("num_buckets", [1, 2, 40, 129, 160])
def test_buckets_are_those_of_the_naive_twin(times, num_buckets, level, monkeypatch):
    """With scores of zero, the identity as values and a table that counts, the output names the bucket of each pair."""
    monkeypatch.setattr(attention_call, "HIGHEST_LEVEL", level)
    torch.manual_seed(4)
    thresholds = [x for x in host.bucket_thresholds(160).tolist() if x < 2**31 - 1]
    steps = torch.tensor([x + d for x in thresholds for d in (1, 0, -1)]).sort(descending=True).values
    request = 2**33
    time = request + steps if times == "unordered" else request - steps
    if times == "wide":
        time[0] = request - 2**45
    count = time.numel()
    target = torch.full_like(time, request)
    layout = JaggedLayout.from_cu_seq_lens(torch.tensor([0, count]), count, timestamps=time, target_timestamps=target)
    zeros = torch.zeros(count, 1, 3)
    out = hstu_attention_host(
        zeros, zeros, torch.eye(count)[:, None] * N, layout, max_length=N, position_table=torch.zeros(2 * N - 1),
        time_table=torch.arange(num_buckets) + 1.0,
    )  # fmt: skip
    buckets = time_buckets(target, time, num_buckets)
    expected = torch.nn.functional.silu(buckets + 1).tril()
    torch.testing.assert_close(out[:, 0].double(), expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("value", [89.0, 200.0, 3e4])
def test_scores_beyond_the_exponential(value):
    """silu is linear far up and zero far down: no overflow on the way, gradients too."""
    layout = JaggedLayout.from_cu_seq_lens(torch.tensor([0, 9]), 9)
    query = torch.linspace(-value, value, 9).view(9, 1, 1)
    inputs = [query, torch.ones(9, 1, 1), torch.ones(9, 1, 2), torch.zeros(2 * N - 1), None]
    check_against_naive(layout, inputs, 2, tolerance=1e-6)


def test_a_nan_stays_in_its_sequence():
    torch.manual_seed(5)
    layout = layout_of([50, 70, 3])
    inputs, grad = inputs_of(123, 1, 8, 8, with_time=False), torch.randn(123, 1, 8)
    clean = run(hstu_attention_host, layout, inputs, grad)
    inputs[0][60] = torch.nan
    spoiled = run(hstu_attention_host, layout, inputs, grad)
    assert spoiled[0][60].isnan().all() and torch.equal(spoiled[0][50:60], clean[0][50:60])
    for name, want, got in list(zip(NAMES, clean, spoiled, strict=False))[:4]:
        assert torch.equal(got[:50], want[:50]) and torch.equal(got[120:], want[120:]), name


def test_bfloat16_is_computed_in_float32():
    torch.manual_seed(6)
    layout = layout_of([40, 9])
    inputs = [x.bfloat16() for x in inputs_of(49, 2, 16, 16)]
    grad = torch.randn(49, 2, 16).bfloat16()
    wide = run(hstu_attention_host, layout, [x.float() for x in inputs], grad.float())
    for name, want, got in zip(NAMES, wide, run(hstu_attention_host, layout, inputs, grad), strict=True):
        assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16()), name


def test_registered_with_torch():
    torch.manual_seed(7)
    layout = layout_of([5, 12])
    inputs = [x.requires_grad_() for x in inputs_of(17, 2, 4, 3)]
    times = (layout.timestamps, layout.target_timestamps)
    arguments = (*inputs[:3], layout.cu_seq_lens, *inputs[3:], *times, N)
    torch.library.opcheck(
        torch.ops.grzoo.hstu_attention_host.default, arguments, test_utils=["test_schema", "test_faketensor"]
    )


def test_refusals():
    layout = layout_of([N + 1])
    inputs = inputs_of(N + 1, 1, 2, 2)
    with pytest.raises(ValueError, match=f"{N + 1} tokens.*{N}"):
        run(hstu_attention_host, layout, inputs, inputs[2])
    layout = layout_of([3])
    inputs = inputs_of(3, 1, 2, 2)
    with pytest.raises(ValueError, match="float64"):
        run(hstu_attention_host, layout, [x.double() for x in inputs], inputs[2].double())
    layout.timestamps = None
    with pytest.raises(ValueError, match="timestamps"):
        run(hstu_attention_host, layout, inputs, inputs[2])


def test_without_a_compiler_the_eager_path_runs_and_says_so(monkeypatch, caplog, tmp_path):
    torch.manual_seed(8)
    layout = layout_of([30, 4])
    inputs, grad = inputs_of(34, 2, 8, 8), torch.randn(34, 2, 8)
    fast = run(hstu_attention, layout, inputs, grad)
    assert torch.equal(fast[0], run(hstu_attention_host, layout, inputs, grad)[0])
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    for cached in (library, available):
        cached.cache_clear()
    try:
        for _ in range(2):
            slow = run(hstu_attention, layout, inputs, grad)
        assert sum("no C++ compiler" in record.message for record in caplog.records) == 1
    finally:
        monkeypatch.undo()
        for cached in (library, available):
            cached.cache_clear()
    eager = run(functools.partial(hstu_attention_eager), layout, inputs, grad)
    assert all(torch.equal(x, y) for x, y in zip(slow, eager, strict=True))
    for name, want, got in zip(NAMES, eager, fast, strict=True):
        assert_close(got, want, 3e-6, name)
