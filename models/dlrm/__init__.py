"""A DLRM-style baseline for ranking: pooled history, pairwise products, an MLP."""

from .configuration_dlrm import DLRMConfig
from .modeling_dlrm import DLRMForRanking, DLRMModel

__all__ = ["DLRMConfig", "DLRMForRanking", "DLRMModel"]
