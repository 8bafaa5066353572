"""Models of the zoo; importing this package registers them with transformers' auto classes."""

from transformers import AutoConfig, AutoModel

from .auto import AutoModelForRanking, AutoModelForRetrieval
from .base import GenRecPreTrainedModel
from .demo import demo_checkpoint
from .dlrm import DLRMConfig, DLRMForRanking, DLRMModel
from .dlrm_hstu import DLRMHSTUConfig, DLRMHSTUForRanking, DLRMHSTUModel
from .hstu import HSTUConfig, HSTUForRetrieval, HSTUModel
from .mtgr import MTGRConfig, MTGRForRanking, MTGRModel
from .outputs import GenRecModelOutput, RankingModelOutput, RetrievalModelOutput, RetrievalOutput
from .retrieval import ShardedCatalogue
from .retrieval_model import GenRecForRetrieval
from .sasrec import SASRecConfig, SASRecForRetrieval, SASRecModel

for _config, _model, _auto, _task_model in (
    (DLRMConfig, DLRMModel, AutoModelForRanking, DLRMForRanking),
    (DLRMHSTUConfig, DLRMHSTUModel, AutoModelForRanking, DLRMHSTUForRanking),
    (HSTUConfig, HSTUModel, AutoModelForRetrieval, HSTUForRetrieval),
    (MTGRConfig, MTGRModel, AutoModelForRanking, MTGRForRanking),
    (SASRecConfig, SASRecModel, AutoModelForRetrieval, SASRecForRetrieval),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    _auto.register(_config, _task_model, exist_ok=True)

__all__ = [
    "AutoModelForRanking",
    "AutoModelForRetrieval",
    "DLRMConfig",
    "DLRMForRanking",
    "DLRMHSTUConfig",
    "DLRMHSTUForRanking",
    "DLRMHSTUModel",
    "DLRMModel",
    "GenRecForRetrieval",
    "GenRecModelOutput",
    "GenRecPreTrainedModel",
    "HSTUConfig",
    "HSTUForRetrieval",
    "HSTUModel",
    "MTGRConfig",
    "MTGRForRanking",
    "MTGRModel",
    "RankingModelOutput",
    "RetrievalModelOutput",
    "RetrievalOutput",
    "SASRecConfig",
    "SASRecForRetrieval",
    "SASRecModel",
    "ShardedCatalogue",
    "demo_checkpoint",
]
