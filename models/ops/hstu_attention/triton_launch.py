"""How the Triton kernels of silu attention are launched: tiles, strides, constants; shared by the ops that use them."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from grzoo.embeddings.kernels.triton.launch import INTERPRETED, on
from torch import Tensor

from . import triton_kernels as kernels


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched: rows of a tile, warps of a program, stages of its loads."""

    tile: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def launch_of(key_width: int, value_width: int, dtype: torch.dtype, *, hopper: bool) -> Launch:
    """Return a launch whose tiles nearly fit the registers: see what `grzoo.models.ops.inspect` tells."""
    # Products are cut by rows among the warps: a tile of 64 rows has work for four, more do the same rows again, as do
    # four with 32 rows. With fewer, registers would not hold a tile.
    width = max(padded(key_width), padded(value_width))
    if dtype == torch.float32:
        return Launch(32, 4, 1) if width <= 64 else Launch(16, 4, 1)
    if width <= 64 and hopper:
        return Launch(64, 4, 2)
    return Launch(32, 4, 2) if width <= 128 else Launch(32, 8, 1)


def launch_for(query: Tensor, value: Tensor) -> Launch:
    is_nvidia = query.device.type == "cuda" and not torch.version.hip
    hopper = is_nvidia and torch.cuda.get_device_capability(query.device) >= (9, 0)
    return launch_of(query.shape[2], value.shape[2], value.dtype, hopper=hopper)


def padded(width: int) -> int:
    """Width of a row in a tile: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(width))


def precision() -> str:
    """How float32 products are formed: exact up to rounding, on tensor cores where that can be."""
    if INTERPRETED:
        return "interpreted"
    return "ieee" if torch.version.hip else "tf32x3"


@dataclass(frozen=True)
class Attention:
    """What the kernels of one call share beside the tokens.

    Attributes:
        starts: int64 [B + 1].
        rows, columns: the tiles of rows and of columns, int32 [n] sequence and block each.
        tables: position table, time table, query times, key times, thresholds; any tensor where it is not read.
        position, times: whether there is a position bias; who sees whom (TIMES of the kernels).
        buckets: of the time bias; 0: none.
        max_length, max_distance, scale, divisor: see `forward_kernel`.
    """

    starts: Tensor
    rows: tuple[Tensor, Tensor]
    columns: tuple[Tensor, Tensor]
    tables: tuple[Tensor, ...]
    position: bool
    times: int
    buckets: int
    max_length: int
    max_distance: int
    scale: float
    divisor: float

    def constants(self, query: Tensor, value: Tensor) -> dict[str, Any]:
        """Constants and options of a launch for these tokens."""
        launch = launch_for(query, value)
        return {
            "WIDTH_K": query.shape[2],
            "WIDTH_V": value.shape[2],
            "PADDED_K": padded(query.shape[2]),
            "PADDED_V": padded(value.shape[2]),
            "TILE": launch.tile,
            "BUCKETS": self.buckets,
            "PRECISION": precision(),
            **launch.options,
        }

    def masks(self) -> dict[str, int]:
        """Constants of the kernels that work by rows and columns."""
        return {"POSITION": int(self.position), "TIMES": self.times}


def forward(query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
    """Tokens [T, H, d] -> [T, H, dv] in the dtype of `value`."""
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    query, key, value = (dense(x) for x in (query, key, value))
    a = attention
    if a.rows[0].numel():
        with on(query.device):
            kernels.forward_kernel[(a.rows[0].numel(), query.shape[1])](
                query, key, value, out, a.starts, *a.rows, *a.tables, *strides(query, key, value, out),
                a.max_length, a.max_distance, a.scale, a.divisor, **a.constants(query, value), **a.masks(),
            )  # fmt: skip
    return out


def gradients(sources: tuple[Tensor, Tensor, Tensor, Tensor], attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value and the gradient of the output, dense in their last dimension -> their three gradients."""
    query, key, value, _ = sources
    dquery, dkey, dvalue = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    a = attention
    if a.rows[0].numel():
        numbers = a.max_length, a.max_distance, a.scale, a.divisor
        constants = a.constants(query, value) | a.masks()
        with on(query.device):
            kernels.query_gradient_kernel[(a.rows[0].numel(), query.shape[1])](
                *sources, dquery, a.starts, *a.rows, *a.tables, *strides(*sources, dquery), *numbers, **constants
            )
            kernels.key_value_gradient_kernel[(a.columns[0].numel(), query.shape[1])](
                *sources, dkey, dvalue, a.starts, *a.columns, *a.tables, *strides(*sources, dkey, dvalue), *numbers,
                **constants,
            )  # fmt: skip
    return dquery, dkey, dvalue


def dense(x: Tensor) -> Tensor:
    """Return x [T, H, d] with its last dimension contiguous."""
    return x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Strides of tokens and heads."""
    return [x.stride(dimension) for x in tensors for dimension in (0, 1)]
