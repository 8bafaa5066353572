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

AutoConfig.register(HSTUConfig.model_type, HSTUConfig, exist_ok=True)
AutoModel.register(HSTUConfig, HSTUModel, exist_ok=True)
AutoModelForRetrieval.register(HSTUConfig, HSTUForRetrieval, exist_ok=True)
AutoConfig.register(MTGRConfig.model_type, MTGRConfig, exist_ok=True)
AutoModel.register(MTGRConfig, MTGRModel, exist_ok=True)
AutoModelForRanking.register(MTGRConfig, MTGRForRanking, exist_ok=True)
for _config, _model, _ranking in (
    (DLRMConfig, DLRMModel, DLRMForRanking),
    (DLRMHSTUConfig, DLRMHSTUModel, DLRMHSTUForRanking),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForRanking.register(_config, _ranking, exist_ok=True)
AutoConfig.register(SASRecConfig.model_type, SASRecConfig, exist_ok=True)
AutoModel.register(SASRecConfig, SASRecModel, exist_ok=True)
AutoModelForRetrieval.register(SASRecConfig, SASRecForRetrieval, exist_ok=True)

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
