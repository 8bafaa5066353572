"""Models of the zoo; importing this package registers them with transformers' auto classes."""

from transformers import AutoConfig, AutoModel

from .auto import AutoModelForRetrieval
from .base import GenRecPreTrainedModel
from .hstu import HSTUConfig, HSTUForRetrieval, HSTUModel
from .outputs import GenRecModelOutput, RetrievalModelOutput, RetrievalOutput
from .retrieval import ShardedCatalogue

AutoConfig.register(HSTUConfig.model_type, HSTUConfig, exist_ok=True)
AutoModel.register(HSTUConfig, HSTUModel, exist_ok=True)
AutoModelForRetrieval.register(HSTUConfig, HSTUForRetrieval, exist_ok=True)

__all__ = [
    "AutoModelForRetrieval",
    "GenRecModelOutput",
    "GenRecPreTrainedModel",
    "HSTUConfig",
    "HSTUForRetrieval",
    "HSTUModel",
    "RetrievalModelOutput",
    "RetrievalOutput",
    "ShardedCatalogue",
]
