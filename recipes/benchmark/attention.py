"""HSTU attention on a CPU, forward + backward: the packed C++ path against code that pads to the longest of the batch.

    python -m grzoo.recipes.benchmark.attention --quick

Contestants, interleaved round by round, with the same sequences and the same threads:
    host          the C++ path: packed, time buckets computed on the way
    grouped       the PyTorch path that runs without a compiler: packed, groups of nearly equal length
    padded_eager  silu(Q K^T + position bias + time bias) V on [B, H, longest, d]; time buckets computed beforehand
    padded_sdpa   scaled_dot_product_attention with the same biases as an additive mask: the same shape of work with
                  softmax for silu, not the same function
    padded_sdpa_no_bias  the same with is_causal and no bias at all: less work than HSTU needs

The baselines start from tensors that are padded already. `speedup_vs_padded` (lengths of ml-1m, at most 200) and
`speedup_vs_padded_zipf` (at most 2,048) divide the lesser median of padded_eager and padded_sdpa by that of host.
`memory_vs_padded` divides the peak of host, above what the inputs take, by the lesser peak of these two: the larger
ratio of both workloads. Lengths: from $GRZOO_DATA/ml-1m/ml-1m.txt (`user item` lines) where it is, else drawn to
the percentiles of ml-1m.
"""

import argparse
import ctypes
import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grzoo.models.ops.hstu_attention import hstu_attention_eager, hstu_attention_host
from grzoo.models.ops.hstu_attention.bias import position_bias, time_buckets
from grzoo.models.packing import JaggedLayout
from torch import Tensor
from torch.nn import functional as F

from .reporting import print_headline, spread, write_rows

BASELINES = ("padded_eager", "padded_sdpa")
NUM_BUCKETS = 129


@dataclass
class Workload:
    """Sequences, inputs and tables of one comparison."""

    name: str
    lengths: list[int]
    source: str
    heads: int
    head_dim: int
    max_length: int
    rounds: int

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = sum(self.lengths)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        # Gaps of seconds within a visit and of weeks between visits.
        gaps = torch.exp(2.5 + 3.0 * torch.randn(self.tokens + 1, generator=generator)).long()
        times = gaps.cumsum(0)
        self.timestamps, self.target_timestamps = times[:-1], times[1:]
        shape = (self.tokens, self.heads, self.head_dim)
        self.query, self.key, self.value, self.grad = (torch.randn(shape, generator=generator) for _ in range(4))
        self.position_table = torch.randn(2 * self.max_length - 1, generator=generator)
        self.time_table = torch.randn(NUM_BUCKETS, generator=generator)

    def layout(self) -> JaggedLayout:
        return JaggedLayout.from_cu_seq_lens(
            torch.from_numpy(self.starts),
            self.tokens,
            timestamps=self.timestamps,
            target_timestamps=self.target_timestamps,
        )

    def pad(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [B, longest, ...], zeros behind each sequence."""
        parts = packed.split(self.lengths)
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


Step = Callable[[], Any]


def packed_step(workload: Workload, function: Callable[..., Tensor]) -> Step:
    """One forward and backward of a packed implementation."""
    leaves = _leaves(workload.query, workload.key, workload.value, workload.position_table, workload.time_table)
    query, key, value, position, time_table = leaves

    def step() -> Any:
        out = function(
            query, key, value, workload.layout(), max_length=workload.max_length, position_table=position,
            time_table=time_table,
        )  # fmt: skip
        return torch.autograd.grad(out, leaves, workload.grad)

    return step


def padded_step(workload: Workload, contestant: str) -> Step:
    """One forward and backward of a padded implementation."""
    query, key, value, grad = (
        workload.pad(x).transpose(1, 2).contiguous()
        for x in (workload.query, workload.key, workload.value, workload.grad)
    )
    leaves = _leaves(query, key, value, workload.position_table, workload.time_table)
    query, key, value, position, time_table = leaves
    n, longest = workload.max_length, max(workload.lengths)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    buckets = None
    if contestant != "padded_sdpa_no_bias":
        times = [workload.pad(x) for x in (workload.target_timestamps, workload.timestamps)]
        buckets = torch.stack([time_buckets(t, s, NUM_BUCKETS).long() for t, s in zip(*times, strict=True)])

    def bias() -> Tensor:
        return (position_bias(position, 0, longest, longest) + time_table[buckets]).unsqueeze(1)

    def step() -> Any:
        if contestant == "padded_eager":
            weights = F.silu(query @ key.mT + bias()) / n * causal
            return torch.autograd.grad(weights @ value, leaves, grad)
        if contestant == "padded_sdpa":
            mask = bias().masked_fill(~causal, -torch.inf)
            return torch.autograd.grad(F.scaled_dot_product_attention(query, key, value, mask), leaves, grad)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return torch.autograd.grad(out, leaves[:3], grad)

    return step


def compare(workload: Workload) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Run all contestants in turn; return CSV rows, and the headline figures `speedup` and `memory`."""
    functions = {"host": hstu_attention_host, "grouped": hstu_attention_eager}
    steps = {name: packed_step(workload, function) for name, function in functions.items()}
    steps |= {name: padded_step(workload, name) for name in (*BASELINES, "padded_sdpa_no_bias")}
    peaks = {name: peak_memory(step) for name, step in steps.items()}  # also the first, untimed run
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(workload.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    about = {
        "workload": workload.name,
        "lengths": workload.source,
        "sequences": len(workload.lengths),
        "tokens": workload.tokens,
        "longest": max(workload.lengths),
        "heads": workload.heads,
        "head_dim": workload.head_dim,
        "rounds": workload.rounds,
    }
    host = float(np.median(times["host"]))
    rows = [
        about
        | {"contestant": name, **spread(times[name]), "over_host": round(float(np.median(times[name])) / host, 2)}
        | {"peak_mb": None if isnan(peaks[name]) else round(peaks[name] / 1e6, 1)}
        for name in steps
    ]
    best = min(float(np.median(times[name])) for name in BASELINES)
    peak = min(peaks[name] for name in BASELINES)
    return rows, {"speedup": best / host, "memory": peaks["host"] / peak}


def peak_memory(step: Step) -> float:
    """Bytes of resident memory that one step takes above what is there before; NaN where Linux does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        step()
        return nan
    before = _status("VmRSS")
    step()
    return max(_status("VmHWM") - before, 1)


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in tensors]


def ml1m_lengths(batch: int, longest: int) -> tuple[list[int], str]:
    """Lengths of `batch` users as inputs (one event less than the history), cut to the last `longest`."""
    generator = np.random.default_rng(0)
    path = Path(os.environ.get("GRZOO_DATA", "")) / "ml-1m" / "ml-1m.txt"
    if path.is_file():
        counts = np.bincount(np.loadtxt(path, dtype=np.int64, usecols=0))
        events, source = counts[counts > 1], path.name
    else:
        # Log-normal through the percentiles of ml-1m: 96 at 50 %, 400 at 90 %, 906 at 99 %.
        events, source = np.exp(np.log(96) + 1.05 * generator.standard_normal(6040)).astype(np.int64) + 2, "synthetic"
    picked = generator.choice(events, batch, replace=False)
    return np.minimum(picked - 1, longest).tolist(), f"{source} <= {longest}"


def zipf_lengths(batch: int, longest: int) -> tuple[list[int], str]:
    """Lengths from 64 on with probability proportional to 1 / length."""
    possible = np.arange(64, longest + 1)
    weights = 1 / possible
    picked = np.random.default_rng(0).choice(possible, batch, p=weights / weights.sum())
    return picked.tolist(), f"zipf(1) 64..{longest}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both comparisons, write the rows, end with the headline figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sequences: under a minute")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rounds = 5 if options.quick else 15
    short = Workload("ml-1m", *ml1m_lengths(128, 200), heads=1, head_dim=50, max_length=211, rounds=rounds)
    long = Workload(
        "zipf", *zipf_lengths(6 if options.quick else 16, 2048), heads=1, head_dim=64, max_length=2048,
        rounds=3 if options.quick else 7,
    )  # fmt: skip
    short_rows, short_figures = compare(short)
    long_rows, long_figures = compare(long)
    write_rows(short_rows + long_rows, options.csv)
    memory = max(short_figures["memory"], long_figures["memory"])
    print_headline(
        {
            "speedup_vs_padded": round(short_figures["speedup"], 2),
            "speedup_vs_padded_zipf": round(long_figures["speedup"], 2),
            "memory_vs_padded": None if isnan(memory) else round(memory, 3),
        }
    )


if __name__ == "__main__":
    main()
