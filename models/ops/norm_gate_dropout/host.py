"""LayerNorm, gate and keyed dropout in C++ on the host: one pass, nothing kept but the inputs."""

import ctypes

import torch
from grzoo.models.ops.host import HIGHEST_LEVEL, library
from grzoo.models.ops.keyed_dropout.row_keys import row_keys
from grzoo.models.ops.shapes import check_shape
from torch import Tensor


def norm_gate_dropout_host(
    x: Tensor, gate: Tensor, *, eps: float, p: float = 0.0, token_keys: Tensor | None = None, site: int = 0
) -> Tensor:
    """`norm_gate_dropout_naive` (formula and shapes there) on float32 CPU tensors, the same mask bit for bit.

    Raises:
        ValueError: for another device or dtype, and sizes that do not fit.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or gate.dtype != torch.float32:
        raise ValueError(
            f"The host kernel takes float32 CPU tensors, got {x.dtype} and {gate.dtype} on {x.device}: "
            "use norm_gate_dropout."
        )
    keys = None if token_keys is None else row_keys(token_keys, site)
    out: Tensor = _norm_gate_dropout(x, gate, keys, eps, p)
    return out


@torch.library.custom_op("grzoo::norm_gate_dropout_host", mutates_args=(), device_types="cpu")
def _norm_gate_dropout(x: Tensor, gate: Tensor, row_keys: Tensor | None, eps: float, p: float) -> Tensor:
    out = torch.empty(x.shape)
    _run(x, gate, None, row_keys, eps, p, out, None)
    return out


@_norm_gate_dropout.register_fake
def _(x: Tensor, gate: Tensor, row_keys: Tensor | None, eps: float, p: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("grzoo::norm_gate_dropout_host_backward", mutates_args=(), device_types="cpu")
def _norm_gate_dropout_backward(
    grad: Tensor, x: Tensor, gate: Tensor, row_keys: Tensor | None, eps: float, p: float
) -> tuple[Tensor, Tensor]:
    dx, dgate = torch.empty(x.shape), torch.empty(x.shape)
    _run(x, gate, grad, row_keys, eps, p, dx, dgate)
    return dx, dgate


@_norm_gate_dropout_backward.register_fake
def _(grad: Tensor, x: Tensor, gate: Tensor, row_keys: Tensor | None, eps: float, p: float) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))  # type: ignore[return-value]


def _run(
    x: Tensor,
    gate: Tensor,
    grad: Tensor | None,
    row_keys: Tensor | None,
    eps: float,
    p: float,
    out: Tensor,
    dgate: Tensor | None,
) -> None:
    check_shapes(x, gate, grad, row_keys)
    x, gate, grad = _dense(x), _dense(gate), None if grad is None else _dense(grad)
    keys = None if row_keys is None else row_keys.contiguous()
    call = _Call(
        *x.shape,
        *(0 if a is None else a.stride(0) for a in (x, gate, grad)),
        *(None if a is None else a.data_ptr() for a in (x, gate, grad, keys, out, dgate)),
        *(round(p * 2**24), 1 / (1 - p), eps, torch.get_num_threads(), HIGHEST_LEVEL),
    )
    if library().grzoo_norm_gate_dropout(ctypes.byref(call)):
        raise MemoryError("The normalisation on the host found no memory for its rows.")


def check_shapes(x: Tensor, gate: Tensor, grad: Tensor | None, row_keys: Tensor | None) -> None:
    """Raise ValueError unless gate and gradient have the shape of x [T, C], and there is one key for each token."""
    check_shape("gate", gate, x.shape)
    if grad is not None:
        check_shape("grad", grad, x.shape)
    if row_keys is not None:
        check_shape("token_keys", row_keys, x.shape[:1])


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


class _Call(ctypes.Structure):  # GrzooNormGate of host.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "x_stride", "gate_stride", "grad_stride")),
        *((name, ctypes.c_void_p) for name in ("x", "gate", "grad", "row_keys", "out", "dgate")),
        ("threshold", ctypes.c_uint64),
        ("kept", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    ]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.eps, ctx.p = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    dx, dgate = _norm_gate_dropout_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.p)
    return dx, dgate, None, None, None


_norm_gate_dropout.register_autograd(_backward, setup_context=_setup_context)
