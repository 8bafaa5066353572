"""Silu attention in C++ on the host: tiles of one sequence at a time, forward and backward, no padded work."""

import ctypes

import torch
from grzoo.models.ops.host import AttentionCall, View, check_host_tensor, library
from grzoo.models.ops.shapes import check_shape
from grzoo.models.packing import JaggedLayout
from torch import Tensor

from .visibility import ALWAYS, Visibility


def silu_attention_host(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    visibility: Visibility,
    *,
    divisors: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """`silu_attention_naive` (formula and shapes there) on CPU tensors, in float32, the same bits for any thread count.

    Tiles in which nothing is seen are left out. Memory beyond inputs and outputs: linear in the tokens of the
    sequences at work, one sequence per thread. No gradient reaches the divisors.

    Raises:
        ValueError: for tensors that are not on the CPU, float64, and sizes that do not fit.
    """
    check_host_tensor(query)
    out: Tensor = _silu_attention(
        query.float(),
        key.float(),
        value.float(),
        layout.cu_seq_lens,
        visibility.query_times,
        visibility.key_times,
        divisors.float().reciprocal(),
        -1 if visibility.max_distance is None else visibility.max_distance,
        scale,
    )
    return out.to(value.dtype)


@torch.library.custom_op("grzoo::silu_attention_host", mutates_args=(), device_types="cpu")
def _silu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    query_times: Tensor,
    key_times: Tensor,
    inverse: Tensor,
    max_distance: int,
    scale: float,
) -> Tensor:
    out = torch.empty(value.shape, dtype=torch.float32)
    call = _Call(query, key, value, cu_seq_lens, query_times, key_times, inverse, max_distance, scale)
    call.structure.out = out.data_ptr()
    call.run(backward=False)
    return out


@_silu_attention.register_fake
def _(query, key, value, *_) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@torch.library.custom_op("grzoo::silu_attention_host_backward", mutates_args=(), device_types="cpu")
def _silu_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    query_times: Tensor,
    key_times: Tensor,
    inverse: Tensor,
    max_distance: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dquery, dkey, dvalue = (torch.empty(x.shape, dtype=torch.float32) for x in (query, key, value))
    call = _Call(query, key, value, cu_seq_lens, query_times, key_times, inverse, max_distance, scale)
    check_shape("grad_out", grad_out, value.shape)
    call.structure.grad_out = call.view(grad_out)
    call.structure.grad_query, call.structure.grad_key = dquery.data_ptr(), dkey.data_ptr()
    call.structure.grad_value = dvalue.data_ptr()
    call.run(backward=True)
    return dquery, dkey, dvalue


@_silu_attention_backward.register_fake
def _(grad_out, query, key, value, *_) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.max_distance, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    grads = _silu_attention_backward(grad_out, *ctx.saved_tensors, ctx.max_distance, ctx.scale)
    return *grads, None, None, None, None, None, None


_silu_attention.register_autograd(_backward, setup_context=_setup_context)


class _Structure(ctypes.Structure):  # GrzooSiluAttention of host.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_sequences", "heads", "key_width", "value_width")),
        *((name, ctypes.c_int64) for name in ("max_distance", "always")),
        *((name, ctypes.c_void_p) for name in ("cu_seq_lens", "query_times", "key_times", "inverse")),
        *((name, View) for name in ("query", "key", "value", "grad_out")),
        *((name, ctypes.c_void_p) for name in ("out", "grad_query", "grad_key", "grad_value")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    ]


class _Call(AttentionCall):
    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_lens: Tensor,
        query_times: Tensor,
        key_times: Tensor,
        inverse: Tensor,
        max_distance: int,
        scale: float,
    ) -> None:
        fields = _Structure()
        super().__init__(fields, query, key, value, cu_seq_lens, scale)
        fields.max_distance, fields.always = max_distance, ALWAYS
        fields.query_times = self.dense("query_times", query_times, torch.int64, len(query))
        fields.key_times = self.dense("key_times", key_times, torch.int64, len(query))
        fields.inverse = self.dense("divisors", inverse, torch.float32, len(query))

    def run(self, *, backward: bool) -> None:
        code = library().grzoo_silu_attention(ctypes.byref(self.structure), ctypes.c_int(backward))
        if code:
            raise MemoryError("The silu attention on the host found no memory for its tiles.")
