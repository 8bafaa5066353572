"""DLRM-HSTU, the ranking form of HSTU ("STU" layers, several candidates per pass)."""

from .configuration_dlrm_hstu import DLRMHSTUConfig
from .modeling_dlrm_hstu import DLRMHSTUForRanking, DLRMHSTUModel

__all__ = ["DLRMHSTUConfig", "DLRMHSTUForRanking", "DLRMHSTUModel"]
