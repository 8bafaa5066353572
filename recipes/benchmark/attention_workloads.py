"""HSTU's attention as a benchmark: lengths, inputs, and what runs on them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grzoo.models.ops.hstu_attention import hstu_attention_eager, hstu_attention_host
from grzoo.models.ops.hstu_attention.bias import position_bias, time_buckets
from grzoo.models.packing import JaggedLayout
from torch import Tensor
from torch.nn import functional as F

BASELINES = ("padded_eager", "padded_sdpa")
NUM_BUCKETS = 129
Step = Callable[[], Any]


@dataclass
class Workload:
    """HSTU's causal attention with both biases: sequences, inputs and tables of one comparison."""

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

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device, what the products read in this dtype."""
        for name in ("query", "key", "value", "grad"):
            setattr(self, name, getattr(self, name).to(device, dtype))
        for name in ("timestamps", "target_timestamps", "position_table", "time_table"):
            setattr(self, name, getattr(self, name).to(device))

    def layout(self) -> JaggedLayout:
        return JaggedLayout.from_cu_seq_lens(
            torch.from_numpy(self.starts).to(self.query.device),
            self.tokens,
            timestamps=self.timestamps,
            target_timestamps=self.target_timestamps,
        )

    def steps(self) -> dict[str, Step]:
        """One forward and backward of each contestant."""
        functions = {"host": hstu_attention_host, "grouped": hstu_attention_eager}
        steps = {name: packed_step(self, function) for name, function in functions.items()}
        return steps | {name: padded_step(self, name) for name in (*BASELINES, "padded_sdpa_no_bias")}

    def pad(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [B, longest, ...], zeros behind each sequence."""
        parts = packed.split(self.lengths)
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def packed_step(workload: Workload, function: Callable[..., Tensor]) -> Step:
    """One forward and backward of a packed implementation."""
    leaves = leaves_of(workload.query, workload.key, workload.value, workload.position_table, workload.time_table)
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
    leaves = leaves_of(query, key, value, workload.position_table, workload.time_table)
    query, key, value, position, time_table = leaves
    n, longest = workload.max_length, max(workload.lengths)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril()
    buckets = None
    if contestant != "padded_sdpa_no_bias":
        times = [workload.pad(x) for x in (workload.target_timestamps, workload.timestamps)]
        buckets = torch.stack([time_buckets(t, s, NUM_BUCKETS).long() for t, s in zip(*times, strict=True)])

    def bias() -> Tensor:
        return (position_bias(position, 0, longest, longest) + time_table[buckets]).unsqueeze(1)

    def step() -> Any:
        if contestant == "padded_eager":
            weights = F.silu(query @ key.mT + bias().to(query.dtype)) / n * causal
            return torch.autograd.grad(weights @ value, leaves, grad)
        if contestant == "padded_sdpa":
            mask = bias().masked_fill(~causal, -torch.inf)
            return torch.autograd.grad(F.scaled_dot_product_attention(query, key, value, mask), leaves, grad)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return torch.autograd.grad(out, leaves[:3], grad)

    return step


def leaves_of(*tensors: Tensor) -> list[Tensor]:
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
