"""Dynamic embedding tables for any torch program: see README.md in this folder."""

from .collection import DynamicEmbeddingCollection
from .config import FeatureConfig, TableConfig
from .jagged import Jagged
from .optimizers import (
    SparseAdagrad,
    SparseAdam,
    SparseAdamW,
    SparseOptimizer,
    SparseRowwiseAdagrad,
    SparseSGD,
)
from .policy_config import policies_by_table
from .schema import features_from_schema
from .step import MicroBatchEmbeddings, Step

__all__ = [
    "DynamicEmbeddingCollection",
    "FeatureConfig",
    "Jagged",
    "MicroBatchEmbeddings",
    "SparseAdagrad",
    "SparseAdam",
    "SparseAdamW",
    "SparseOptimizer",
    "SparseRowwiseAdagrad",
    "SparseSGD",
    "Step",
    "TableConfig",
    "policies_by_table",
    "features_from_schema",
]
