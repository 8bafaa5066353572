"""Attention on a CPU, forward + backward: the packed C++ paths against code that pads to the longest of the batch.

    python -m grzoo.recipes.benchmark.attention --quick

Contestants, interleaved round by round, with the same sequences and the same threads:
    host          the C++ path: packed, time buckets and masks computed on the way
    grouped       the PyTorch path that runs without a compiler: packed, groups of nearly equal length
    padded_eager  silu(Q K^T + position bias + time bias) V on [B, H, longest, d]; time buckets computed beforehand
    padded_sdpa   scaled_dot_product_attention with the same biases as an additive mask: the same shape of work with
                  softmax for silu, not the same function
    padded_sdpa_no_bias  the same with is_causal and no bias at all: less work than HSTU needs

Workloads: `ml-1m` and `zipf` are HSTU's attention, with both biases; `mtgr` is silu attention under MTGR's dynamic mask
on [profile | history | real-time events | candidates], its padded masks are made beforehand. The baselines start from
tensors that are padded already. `speedup_vs_padded` (lengths of ml-1m, at most 200), `speedup_vs_padded_zipf` (at most
2,048) and `speedup_vs_padded_mtgr` divide the lesser median of padded_eager and padded_sdpa by that of host.
`memory_vs_padded` divides the peak of host, above what the inputs take, by the lesser peak of these two: the largest
ratio of the first two workloads; `memory_vs_padded_mtgr` of the third. Lengths: from $GRZOO_DATA/ml-1m/ml-1m.txt
(`user item` lines) where it is, else drawn to the percentiles of ml-1m. `--device cuda` measures the Triton kernels
instead, see attention_device.py.
"""

import argparse
import ctypes
import gc
import time
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import attention_device
from .attention_masked import MaskedWorkload, masked_workload
from .attention_workloads import BASELINES, Step, Workload, ml1m_lengths, zipf_lengths
from .reporting import print_headline, spread, write_rows


def compare(workload: Workload | MaskedWorkload) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Run all contestants in turn; return CSV rows, and the headline figures `speedup` and `memory`."""
    steps = workload.steps()
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


def run_on_cpu(quick: bool, csv: Path | None) -> dict[str, Any]:
    """Run the comparisons, write the rows, return the headline figures."""
    rounds = 5 if quick else 15
    short = Workload("ml-1m", *ml1m_lengths(128, 200), heads=1, head_dim=50, max_length=211, rounds=rounds)
    long = Workload(
        "zipf", *zipf_lengths(6 if quick else 16, 2048), heads=1, head_dim=64, max_length=2048,
        rounds=3 if quick else 7,
    )  # fmt: skip
    masked = masked_workload(*ml1m_lengths(32, 500), rounds=rounds)
    found = [compare(workload) for workload in (short, long, masked)]
    write_rows([row for rows, _ in found for row in rows], csv)
    figures = {
        "speedup_vs_padded": round(found[0][1]["speedup"], 2),
        "speedup_vs_padded_zipf": round(found[1][1]["speedup"], 2),
        "speedup_vs_padded_mtgr": round(found[2][1]["speedup"], 2),
    }
    memory = {
        "memory_vs_padded": max(f["memory"] for _, f in found[:2]),
        "memory_vs_padded_mtgr": found[2][1]["memory"],
    }
    return figures | {name: None if isnan(value) else round(value, 3) for name, value in memory.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparisons, write the rows, end with the headline figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sequences: under a minute")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        print_headline(run_on_cpu(options.quick, options.csv))
        return
    rows = attention_device.rows(5 if options.quick else 20)
    write_rows(rows, options.csv)
    best = {name: max(row["tflops"] for row in rows if row["contestant"] == name) for name in ("triton", "ceiling")}
    print_headline({f"tflops_{name}": value for name, value in best.items()})


if __name__ == "__main__":
    main()
