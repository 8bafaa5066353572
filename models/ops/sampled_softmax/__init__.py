"""Softmax over one positive and sampled negatives, without a [tokens, negatives, dim] tensor."""

from .host import sampled_softmax_loss_host
from .loss import sampled_softmax_loss
from .naive import sampled_logits_naive, sampled_softmax_loss_naive
from .sampled_logits import sampled_logits

__all__ = [
    "sampled_logits",
    "sampled_logits_naive",
    "sampled_softmax_loss",
    "sampled_softmax_loss_host",
    "sampled_softmax_loss_naive",
]
