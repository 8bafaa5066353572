"""Sampled softmax over the unique rows of a step."""

import torch
from grzoo.models.ops.host import available
from grzoo.models.ops.triton_available import takes_triton
from torch import Tensor

from .host import sampled_softmax_loss_host
from .naive import MASKED_LOGIT, l2_normalize
from .sampled_logits import sampled_logits


def sampled_softmax_loss(
    query: Tensor,
    rows: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    accidental: Tensor,
    *,
    temperature: float,
    positive_log_q: Tensor | None = None,
    negative_log_q: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """`sampled_softmax_loss_naive` (formula and shapes there); normalises each row once, always in float32."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    own_negatives = negative_index.dim() == 2 and positive_log_q is None and normalize
    if own_negatives and query.device.type == "cpu" and dtype == torch.float32 and available():
        return sampled_softmax_loss_host(
            query, rows, positive_index, negative_index, accidental, temperature=temperature
        )
    with torch.autocast(query.device.type, enabled=False):
        if own_negatives and dtype == torch.float32 and takes_triton(query):
            from .triton import sampled_softmax_loss_triton

            return sampled_softmax_loss_triton(
                query, rows, positive_index, negative_index, accidental, temperature=temperature
            )
        query = l2_normalize(query.to(dtype)) if normalize else query.to(dtype)
        if negative_index.dim() == 1:
            logits = _shared_logits(query, rows.to(dtype), positive_index, negative_index, normalize)
        else:
            index = torch.cat([positive_index.unsqueeze(1), negative_index], dim=1)
            logits = own_logits(query, rows.to(dtype), index, normalize)
        logits = logits / temperature
        if positive_log_q is not None and negative_log_q is not None:
            shared = negative_log_q.expand(query.shape[0], -1)
            logits = logits - torch.cat([positive_log_q.unsqueeze(1), shared], dim=1)
        positive, negative = logits[:, 0], logits[:, 1:].masked_fill(accidental, MASKED_LOGIT)
        return (torch.logaddexp(negative.logsumexp(1), positive) - positive).sum()


def own_logits(query: Tensor, rows: Tensor, index: Tensor, normalize: bool) -> Tensor:
    """[T, 1 + N] products; normalises the rows of the step, or the picked ones where these are fewer."""
    if rows.shape[0] > index.numel():
        rows = torch.nn.functional.embedding(index.flatten(), rows)  # whose gradient is deterministic on a GPU
        index = torch.arange(index.numel(), device=index.device).view(index.shape)
    return sampled_logits(query, l2_normalize(rows) if normalize else rows, index)


def _shared_logits(
    query: Tensor, rows: Tensor, positive_index: Tensor, negative_index: Tensor, normalize: bool
) -> Tensor:
    """[T, 1 + N] products with one set of negatives for all tokens."""
    picked = torch.nn.functional.embedding(torch.cat([positive_index, negative_index]), rows)
    picked = l2_normalize(picked) if normalize else picked
    positive_rows, negative_rows = picked.tensor_split([positive_index.numel()])
    return torch.cat([(query * positive_rows).sum(1, keepdim=True), query @ negative_rows.T], dim=1)
