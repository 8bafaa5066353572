"""Dropout whose mask belongs to (token, site, column), so that micro-batches and ranks do not change it."""

from .eager import keyed_dropout
from .naive import keyed_dropout_naive

__all__ = ["keyed_dropout", "keyed_dropout_naive"]
