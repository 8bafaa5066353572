"""MTGR, the generative ranking model of arXiv 2505.18654."""

from .configuration_mtgr import MTGRConfig
from .modeling_mtgr import MTGRForRanking, MTGRModel

__all__ = ["MTGRConfig", "MTGRForRanking", "MTGRModel"]
