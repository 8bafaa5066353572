"""A DLRM-style baseline (arXiv 1906.00091) at the features of the other ranking models; see this folder's README."""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from grzoo.models.ops.keyed_dropout import keyed_dropout
from grzoo.models.ranking import GenRecForRanking, RankingBackbone, RankingBatch, RankingPreTrainedModel
from grzoo.models.ranking.past import candidate_owners, events_before
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_dlrm import DLRMConfig


class DLRMPreTrainedModel(RankingPreTrainedModel):
    config: DLRMConfig
    supports_gradient_checkpointing = False
    attention_functions = {}  # it has no attention


class DLRMModel(DLRMPreTrainedModel, RankingBackbone):
    """Profile vectors, the mean of the earlier events and the candidate, their products, an MLP.

    Args:
        config: hyperparameters.
        embedding_backend: of the tables, see `DynamicEmbeddingCollection`.
    """

    def __init__(self, config: DLRMConfig, *, embedding_backend: str = "auto") -> None:
        super().__init__(config, embedding_backend=embedding_backend)
        sizes = [config.interaction_size, *[config.mlp_size] * config.num_mlp_layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.post_init()

    @property
    def output_size(self) -> int:
        return self.config.mlp_size

    def forward(self, batch: RankingBatch, embeddings: Mapping[str, Tensor]) -> Tensor:
        """[C, mlp_size] for the C candidates; with dropout where the batch holds keys."""
        profile, events, candidates = self.features(batch, embeddings)
        users, owner = len(batch.layout.lengths), candidate_owners(batch)
        tokens = self.features.num_user_tokens, self.config.hidden_size
        # An embedding, whose gradient is deterministic on a GPU.
        profile = F.embedding(owner, profile.view(users, math.prod(tokens))).view(len(owner), *tokens)
        history = _mean_of_past(batch, events, owner)
        vectors = torch.cat([profile, history.unsqueeze(1), candidates.unsqueeze(1)], dim=1)
        first, second = torch.triu_indices(self.config.num_vectors, self.config.num_vectors, 1, device=vectors.device)
        products = (vectors @ vectors.mT)[:, first, second]
        hidden = torch.cat([vectors.flatten(1), products / self.config.hidden_size**0.5], dim=-1)
        for site, layer in enumerate(self.layers):
            hidden = F.silu(layer(hidden))
            if batch.candidate_keys is not None:
                hidden = keyed_dropout(hidden, self.config.hidden_dropout, batch.candidate_keys, site)
        return hidden


def _mean_of_past(batch: RankingBatch, events: Tensor, owner: Tensor) -> Tensor:
    """Mean of the events before each candidate, zero without any: [T, D] -> [C, D]."""
    # Sums of all events before a place: in float64 their differences are exact enough for float32.
    sums = F.pad(events.double().cumsum(0), (0, 0, 1, 0))
    first, count = batch.layout.cu_seq_lens[owner], events_before(batch)
    total = F.embedding(first + count, sums) - F.embedding(first, sums)
    return (total / count.clamp(min=1).unsqueeze(1)).to(events.dtype)


class DLRMForRanking(DLRMPreTrainedModel, GenRecForRanking):
    """The baseline with one logit per candidate and task.

    Args:
        config: hyperparameters.
        embedding_backend: of the tables, see `DynamicEmbeddingCollection`.
    """

    backbone_class = DLRMModel


__all__ = ["DLRMForRanking", "DLRMModel", "DLRMPreTrainedModel"]
