"""HSTU: hierarchical sequential transduction units, retrieval form."""

from .configuration_hstu import HSTUConfig
from .modeling_hstu import HSTUForRetrieval, HSTUModel

__all__ = ["HSTUConfig", "HSTUForRetrieval", "HSTUModel"]
