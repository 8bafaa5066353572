"""Full softmax in chunks of tokens: the gradients are formed while the logits of a chunk are at hand."""

import torch
from grzoo.models.ops.host import available
from grzoo.models.ops.shapes import check_shape
from torch import Tensor

from .host import exponentiate_host

# Tokens of a chunk: enough that the products run at the speed of the processor, few enough that the logits of 20,000
# items stay in a cache of a few MB.
_MIN_CHUNK = 64
# Logits of a chunk where the catalogue is small.
_CHUNK_ELEMENTS = {"cpu": 1 << 18}
_DEVICE_CHUNK_ELEMENTS = 1 << 26


def full_softmax_loss(query: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """`full_softmax_loss_naive` (formula and shapes there) with logits of one chunk of tokens at a time; deterministic.

    The gradients are formed together with the loss when one is wanted. Memory beyond inputs and gradients: the logits
    of one chunk of 64 tokens or more, and on a CPU another copy of the items.

    Raises:
        ValueError: for a target without a row.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    with_grads = torch.is_grad_enabled() and (query.requires_grad or items.requires_grad)
    with torch.autocast(query.device.type, enabled=False):
        loss: Tensor = _full_softmax(query.to(dtype), items.to(dtype), target, with_grads)[0]
    return loss


def exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits [t, C] by `exp(logits - largest)`; return largest and the sum of the new row, [t, 1] each."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and available():
        return exponentiate_host(logits)
    largest = logits.amax(1, keepdim=True)
    return largest, logits.sub_(largest).exp_().sum(1, keepdim=True)


@torch.library.custom_op("grzoo::full_softmax", mutates_args=())
def _full_softmax(query: Tensor, items: Tensor, target: Tensor, with_grads: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its gradients by query and items (empty without `with_grads`)."""
    query, items = query.contiguous(), items.contiguous()
    tokens, (count, width) = len(query), items.shape
    check_shape("items", items, (count, query.shape[1]))
    check_shape("target", target, (tokens,))
    _check(target, count)
    dquery = query.new_empty(tokens if with_grads else 0, width)
    ditems = query.new_zeros(count if with_grads else 0, width)
    loss = torch.zeros((), dtype=torch.float64, device=query.device)
    columns = items.T.contiguous() if query.device.type == "cpu" else items.T
    elements = _CHUNK_ELEMENTS.get(query.device.type, _DEVICE_CHUNK_ELEMENTS)
    chunk = min(tokens, max(_MIN_CHUNK, elements // max(1, count)))
    buffer = query.new_empty(chunk, count)  # one for all chunks: new memory costs as much as a pass
    for start in range(0, tokens, max(1, chunk)):
        q, wanted = query[start : start + chunk], target[start : start + chunk]
        logits = torch.mm(q, columns, out=buffer[: len(q)])
        positive = logits.gather(1, wanted.unsqueeze(1))
        largest, total = exponentiate(logits)
        loss += (total.log() + largest - positive).sum()
        if with_grads:
            # The softmax is never written: its denominator goes into the narrow factor of each product.
            torch.mm(logits, items, out=dquery[start : start + chunk]).div_(total)
            ditems.addmm_(logits.T, q / total)
    if with_grads:
        dquery -= items.index_select(0, target)
        _subtract_rows(ditems, target, query)
    return loss.to(query.dtype), dquery, ditems


@_full_softmax.register_fake
def _(query, items, target, with_grads) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    grads = (query.new_empty((len(x) if with_grads else 0, items.shape[1])) for x in (query, items))
    return query.new_empty(()), *grads


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    dquery, ditems = ctx.saved_tensors
    return dquery * grad_loss, ditems * grad_loss, None, None


_full_softmax.register_autograd(_backward, setup_context=_setup_context)


def _check(target: Tensor, count: int) -> None:
    if target.device.type == "cpu" and len(target):  # a GPU would have to be waited for
        low, high = (int(x) for x in target.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"A target has no row: got {low if low < 0 else high}, there are {count} rows.")


def _subtract_rows(out: Tensor, index: Tensor, values: Tensor) -> None:
    if out.device.type == "cpu":
        out.index_add_(0, index, values, alpha=-1)
    else:
        out.index_put_((index,), -values, accumulate=True)  # sorts: deterministic on a GPU
