"""Whether a tensor can be given to Triton; the kernels themselves are imported where they are used."""

import importlib.util
from functools import cache

from torch import Tensor

GPU = "cuda"  # torch's name of NVIDIA's and AMD's alike


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def takes_triton(x: Tensor) -> bool:
    """Whether x is on a GPU, and Triton is installed."""
    return x.device.type == GPU and has_triton()
