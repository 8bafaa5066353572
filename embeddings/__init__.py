"""Dynamic embedding tables for any torch program: see README.md in this folder."""

from .collection import DynamicEmbeddingCollection
from .config import FeatureConfig, TableConfig
from .optimizers import (
    SparseAdagrad,
    SparseAdam,
    SparseAdamW,
    SparseOptimizer,
    SparseRowwiseAdagrad,
    SparseSGD,
)
from .step import MicroBatchEmbeddings, Step

__all__ = [
    "DynamicEmbeddingCollection",
    "FeatureConfig",
    "MicroBatchEmbeddings",
    "SparseAdagrad",
    "SparseAdam",
    "SparseAdamW",
    "SparseOptimizer",
    "SparseRowwiseAdagrad",
    "SparseSGD",
    "Step",
    "TableConfig",
]
