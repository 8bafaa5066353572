"""SASRec: self-attentive sequential recommendation."""

from .configuration_sasrec import SASRecConfig
from .convert_sasrec import convert_weights, load_public_weights
from .modeling_sasrec import SASRecForRetrieval, SASRecModel

__all__ = ["SASRecConfig", "SASRecForRetrieval", "SASRecModel", "convert_weights", "load_public_weights"]
