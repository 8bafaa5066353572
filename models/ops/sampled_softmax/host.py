"""Sampled softmax in C++ on the host: loss and gradients while the sampled rows of a token are in the cache."""

import ctypes

import torch
from grzoo.models.ops.host import HIGHEST_LEVEL, library
from grzoo.models.ops.shapes import check_shape
from torch import Tensor


def sampled_softmax_loss_host(
    query: Tensor,
    rows: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    accidental: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """`sampled_softmax_loss_naive` (formula and shapes there) with negatives of each token, on CPU tensors; float32.

    The gradients are formed together with the loss when one is wanted. Deterministic for any thread count. Memory
    beyond inputs and gradients: 8 bytes for each negative, and the normalised rows.

    Raises:
        ValueError: for tensors that are not on the CPU, float64, shared negatives, an index without a row, or sizes
            that do not fit.
    """
    if query.device.type != "cpu" or query.dtype == torch.float64 or negative_index.dim() != 2:
        raise ValueError(
            "The host kernel takes CPU tensors of at most 32 bits and negatives [T, N]; got "
            f"{query.dtype} on {query.device} and negatives {list(negative_index.shape)}: use sampled_softmax_loss."
        )
    with_grads = torch.is_grad_enabled() and (query.requires_grad or rows.requires_grad)
    loss: Tensor = _sampled_softmax(
        query.float(), rows.float(), positive_index, negative_index, accidental, temperature, with_grads
    )[0]
    return loss


def check_shapes(
    query: Tensor, rows: Tensor, positive_index: Tensor, negative_index: Tensor, accidental: Tensor
) -> None:
    """Raise ValueError unless the sizes of the arguments of `sampled_softmax_loss_host` fit each other."""
    tokens, width = query.shape
    check_shape("rows", rows, (len(rows), width))
    check_shape("positive_index", positive_index, (tokens,))
    check_shape("negative_index", negative_index, (tokens, negative_index.shape[-1]))
    check_shape("accidental", accidental, negative_index.shape)


@torch.library.custom_op("grzoo::sampled_softmax_host", mutates_args=(), device_types="cpu")
def _sampled_softmax(
    query: Tensor,
    rows: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    accidental: Tensor,
    temperature: float,
    with_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its gradients by query and rows (empty without `with_grads`)."""
    check_shapes(query, rows, positive_index, negative_index, accidental)
    query, rows = query.contiguous(), rows.contiguous()
    indices = [x.to(torch.int64).contiguous() for x in (positive_index, negative_index)]
    accidental = accidental.to(torch.bool).contiguous()
    grad_query, grad_rows = (torch.empty(x.shape if with_grads else 0) for x in (query, rows))
    loss = ctypes.c_double()
    call = _Call(
        *(query.shape[0], rows.shape[0], query.shape[1], negative_index.shape[1]),
        *(x.data_ptr() for x in (query, rows, *indices, accidental)),
        *(grad_query.data_ptr(), grad_rows.data_ptr(), ctypes.addressof(loss)),
        *(1 / temperature, torch.get_num_threads(), HIGHEST_LEVEL, with_grads),
    )
    code = library().grzoo_sampled_softmax(ctypes.byref(call))
    if code == 1:
        raise MemoryError("The sampled softmax on the host found no memory for its indices and slopes.")
    if code:
        raise ValueError(f"A positive or negative index has no row: there are {rows.shape[0]} rows.")
    return torch.tensor(loss.value, dtype=torch.float32), grad_query, grad_rows


@_sampled_softmax.register_fake
def _(  # type: ignore[no-untyped-def]
    query, rows, positive_index, negative_index, accidental, temperature, with_grads
) -> tuple[Tensor, Tensor, Tensor]:
    return (query.new_empty(()), *(x.new_empty(x.shape if with_grads else 0) for x in (query, rows)))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    grad_query, grad_rows = ctx.saved_tensors
    return grad_query * grad_loss, grad_rows * grad_loss, None, None, None, None, None


_sampled_softmax.register_autograd(_backward, setup_context=_setup_context)


class _Call(ctypes.Structure):  # GrzooSampled of host.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "num_rows", "width", "negatives")),
        *((name, ctypes.c_void_p) for name in ("query", "rows", "positive", "negative", "accidental")),
        *((name, ctypes.c_void_p) for name in ("grad_query", "grad_rows", "loss")),
        ("inverse_temperature", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
        ("with_grads", ctypes.c_int32),
    ]
