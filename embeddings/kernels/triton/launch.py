"""Where and how kernels are launched: on a CUDA or HIP device, or on the CPU under Triton's interpreter."""

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

GPU = "cuda"  # torch's name of NVIDIA's and AMD's alike
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when triton was imported
# A program costs the same time whatever its size when it is interpreted: larger ones there.
WIDER = 16 if INTERPRETED else 1


def default_device() -> torch.device | None:
    """Return the device that kernels run on; None where there is none."""
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():  # HIP devices are called cuda by torch
        return torch.device("cuda", torch.cuda.current_device())
    return None


def runs_on(tensor: Tensor) -> bool:
    """Whether kernels can be launched on a tensor where it is."""
    return tensor.device.type == GPU or (INTERPRETED and tensor.device.type == "cpu")


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one: Triton launches there and not where the tensors are."""
    return torch.cuda.device(device) if device.type == GPU else contextlib.nullcontext()


def blocks(n: int, block: int) -> tuple[int]:
    """Return the grid of ceil(n / block) programs."""
    return (-(-n // block),)
