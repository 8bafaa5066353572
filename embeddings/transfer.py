"""Moving tensors between host memory and a GPU: through pinned buffers, without waiting for each copy."""

from collections.abc import Sequence

import torch
from torch import Tensor

HOST = torch.device("cpu")


def move(tensors: Sequence[Tensor], devices: torch.device | Sequence[torch.device]) -> list[Tensor]:
    """Return each tensor on its device (or all on one); those that are there already are returned as they are.

    Copies to a GPU are queued and the host goes on. Copies to the host are queued too, and then waited for once.
    """
    if isinstance(devices, torch.device):
        devices = [devices] * len(tensors)
    moved = [_queue(tensor, device) for tensor, device in zip(tensors, devices, strict=True)]
    for device in {t.device for t, m in zip(tensors, moved, strict=True) if t.is_cuda and not m.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return moved


def _queue(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    if tensor.is_cuda and device.type == "cpu":
        return empty_pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, non_blocking=device.type != "cpu")


def empty_pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor in host memory that a GPU can copy from and to while the host goes on.

    Torch keeps freed ones and gives them again once the copies that use them are done.
    """
    return torch.empty(tuple(shape), dtype=dtype, device=HOST, pin_memory=True)
