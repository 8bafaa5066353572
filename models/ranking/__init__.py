"""What the ranking models share: configuration, batches, feature tokens, multi-task head and loss."""

from .batch import RankingBatch, token_order
from .configuration_ranking import RankingConfig
from .features import FeatureTokens
from .heads import MultiTaskHead, multi_task_loss
from .modeling_ranking import GenRecForRanking, RankingBackbone, RankingPreTrainedModel

__all__ = [
    "FeatureTokens",
    "GenRecForRanking",
    "MultiTaskHead",
    "RankingBackbone",
    "RankingBatch",
    "RankingConfig",
    "RankingPreTrainedModel",
    "multi_task_loss",
    "token_order",
]
