"""Keyed dropout in C++ on the host: one pass, no mask in memory."""

import ctypes

import torch
from grzoo.models.ops.host import library
from grzoo.models.ops.shapes import check_shape
from torch import Tensor

from .row_keys import row_keys


def keyed_dropout_host(x: Tensor, p: float, token_keys: Tensor, site: int) -> Tensor:
    """`keyed_dropout_naive` (formula and shapes there) on float32 CPU tensors, the same mask bit for bit.

    Raises:
        ValueError: for another device or dtype, and keys that are not one for each token.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        raise ValueError(f"The host kernel takes float32 CPU tensors, got {x.dtype} on {x.device}: use keyed_dropout.")
    out: Tensor = _keyed_dropout(x, row_keys(token_keys, site), p)
    return out


@torch.library.custom_op("grzoo::keyed_dropout_host", mutates_args=(), device_types="cpu")
def _keyed_dropout(x: Tensor, row_keys: Tensor, p: float) -> Tensor:
    check_shape("token_keys", row_keys, x.shape[:1])
    x, row_keys = x.contiguous(), row_keys.contiguous()
    out = torch.empty(x.shape)
    code = library().grzoo_keyed_dropout(
        *(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(row_keys.data_ptr())),
        *(ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1]), ctypes.c_uint64(round(p * 2**24))),
        *(ctypes.c_float(1 / (1 - p)), ctypes.c_void_p(out.data_ptr()), ctypes.c_int32(torch.get_num_threads())),
    )
    if code:
        raise MemoryError("The keyed dropout on the host found no memory.")
    return out


@_keyed_dropout.register_fake
def _(x: Tensor, row_keys: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, row_keys, ctx.p = inputs
    ctx.save_for_backward(row_keys)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
    return _keyed_dropout(grad, *ctx.saved_tensors, ctx.p), None, None


_keyed_dropout.register_autograd(_backward, setup_context=_setup_context)
