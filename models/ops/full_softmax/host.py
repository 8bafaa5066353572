"""The pass between the products of the full softmax in C++: one reading and one writing of the logits."""

import ctypes

import torch
from grzoo.models.ops.host import HIGHEST_LEVEL, library
from torch import Tensor


def exponentiate_host(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`exponentiate` of chunked.py for dense float32 CPU logits; a row has the same bits for any number of threads."""
    assert logits.dtype == torch.float32 and logits.is_contiguous()
    largest, total = torch.empty(2, len(logits), 1)
    code = library().grzoo_exponentiate(
        *(ctypes.c_void_p(logits.data_ptr()), ctypes.c_int64(logits.shape[0]), ctypes.c_int64(logits.shape[1])),
        *(ctypes.c_void_p(largest.data_ptr()), ctypes.c_void_p(total.data_ptr())),
        *(ctypes.c_int32(torch.get_num_threads()), ctypes.c_int32(HIGHEST_LEVEL)),
    )
    if code:
        raise MemoryError("The full softmax on the host found no memory.")
    return largest, total
