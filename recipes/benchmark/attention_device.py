"""HSTU's attention on a GPU, forward and backward, in TFLOPS: our kernels against padded code and the ceiling.

Contestants, in bfloat16, at equal lengths 128 to 8,192 and at Zipf lengths (64 to 8,192), about 64k tokens each:
    triton        the packed kernels, position and time bias
    masked        the packed kernels under the target-aware mask (no bias), as DLRM-HSTU and MTGR attend
    padded_eager  silu(Q K^T + biases) V on [B, H, longest, d]; left out beyond 2^31 scores (4 GB each tensor of them)
    sdpa          scaled_dot_product_attention, causal, no bias: the same shape, less work
    ceiling       a product of 8,192 x 8,192 matrices
Operations are those of the pairs j <= i of the real tokens, for all of them: what is computed for padding or beyond
the diagonal does not count. A time is the median between two events on the stream, after two untimed rounds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from grzoo.models.ops.hstu_attention import hstu_attention_triton
from grzoo.models.ops.silu_attention import Visibility, silu_attention_triton
from grzoo.models.packing import packed_positions
from torch.nn import functional as F

from .attention_workloads import Step, Workload, leaves_of, padded_step, zipf_lengths
from .reporting import spread

TOKENS, HEADS, HEAD_DIM = 1 << 16, 4, 128
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
MAX_SCORES = 1 << 29  # of padded_eager, whose time bias is differentiated by sorting one key per score


def require_gpu() -> None:
    """Raise SystemExit where the kernels have no device to run on."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch sees; without one leave --device at cpu")


def operations(lengths: Sequence[int]) -> float:
    """Of forward and backward: five and two products over the pairs j <= i."""
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    return 2 * HEADS * pairs * HEAD_DIM * (2 + 5)


def rows(rounds: int) -> list[dict[str, Any]]:
    """CSV rows of all lengths and contestants."""
    require_gpu()
    cases = [(str(n), [n] * (TOKENS // n)) for n in LENGTHS]
    drawn, source = zipf_lengths(128, LENGTHS[-1])
    fitting = int(np.searchsorted(np.cumsum(drawn), TOKENS))
    found = [_ceiling(rounds)]
    for name, lengths in [*cases, (source, drawn[: max(1, fitting)])]:
        for contestant, step in _steps(lengths).items():
            found.append(_row(name, lengths, contestant, _times(step, rounds), operations(lengths)))
    return found


def _steps(lengths: list[int]) -> dict[str, Step]:
    workload = Workload("device", lengths, "", HEADS, HEAD_DIM, max(lengths), 0)
    workload.to(torch.device("cuda"), torch.bfloat16)
    steps: dict[str, Step] = {"triton": _packed(workload), "masked": _masked(workload), "sdpa": _sdpa(workload)}
    if len(lengths) * HEADS * max(lengths) ** 2 <= MAX_SCORES:
        steps["padded_eager"] = padded_step(workload, "padded_eager")
    return steps


def _packed(workload: Workload) -> Step:
    leaves = leaves_of(workload.query, workload.key, workload.value, workload.position_table, workload.time_table)
    query, key, value, position, time = leaves
    layout = workload.layout()

    def step() -> Any:
        out = hstu_attention_triton(
            query, key, value, layout, max_length=workload.max_length, position_table=position, time_table=time
        )
        return torch.autograd.grad(out, leaves, workload.grad)

    return step


def _masked(workload: Workload) -> Step:
    leaves, layout = leaves_of(workload.query, workload.key, workload.value), workload.layout()
    query, key, value = leaves
    places = packed_positions(layout)
    visibility = Visibility(places, places)
    divisors = torch.full_like(places, workload.max_length, dtype=torch.float32)

    def step() -> Any:
        out = silu_attention_triton(query, key, value, layout, visibility, divisors=divisors)
        return torch.autograd.grad(out, leaves, workload.grad)

    return step


def _sdpa(workload: Workload) -> Step:
    sources = (workload.query, workload.key, workload.value, workload.grad)
    query, key, value, grad = (workload.pad(x).transpose(1, 2).contiguous() for x in sources)
    leaves = leaves_of(query, key, value)
    query, key, value = leaves

    def step() -> Any:
        return torch.autograd.grad(F.scaled_dot_product_attention(query, key, value, is_causal=True), leaves, grad)

    return step


def _ceiling(rounds: int) -> dict[str, Any]:
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return _row("8192 x 8192", [], "ceiling", _times(lambda: left @ left, rounds), 2.0 * 8192**3)


def _times(step: Step, rounds: int) -> list[float]:
    """Seconds of each round."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds + 2)]
    for begin, end in events:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events[2:]]


def _row(name: str, lengths: Sequence[int], contestant: str, times: list[float], work: float) -> dict[str, Any]:
    about = {"lengths": name, "sequences": len(lengths), "tokens": sum(lengths), "heads": HEADS, "head_dim": HEAD_DIM}
    speed = {"tflops": round(work / float(np.median(times)) / 1e12, 2), "rounds": len(times)}
    return about | {"contestant": contestant, **spread(times), **speed}
