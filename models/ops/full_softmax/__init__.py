"""Softmax over the whole catalogue, without a [tokens, items] tensor."""

from .chunked import full_softmax_loss
from .naive import full_softmax_loss_naive

__all__ = ["full_softmax_loss", "full_softmax_loss_naive"]
