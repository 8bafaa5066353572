"""DLRM-HSTU, the ranking form of arXiv 2402.17152; equations and differences in this folder's README."""

import math
from collections.abc import Mapping

import torch
from grzoo.models.ops.keyed_dropout import keyed_dropout
from grzoo.models.ops.silu_attention import ALWAYS, NEVER, SILU_ATTENTION_FUNCTIONS, STATIC, Visibility
from grzoo.models.packing import JaggedLayout, packed_positions
from grzoo.models.ranking import GenRecForRanking, RankingBackbone, RankingBatch, RankingPreTrainedModel, token_order
from grzoo.models.ranking.keys import dropout_keys
from grzoo.models.ranking.past import candidate_owners, events_before
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_dlrm_hstu import DLRMHSTUConfig


class STULayer(GradientCheckpointingLayer):
    """`U, V, Q, K = Linear(LN(X)), U = silu(U); X + Linear(dropout(concat[U, A, U * LN(A)]))`, A: attention."""

    def __init__(self, config: DLRMHSTUConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.dropout_site = 1 + layer_idx
        heads, dv, dqk = config.num_attention_heads, config.linear_head_dim, config.attention_head_dim
        self.split_sizes = [heads * dv, heads * dv, heads * dqk, heads * dqk]
        self.input_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.uvqk_proj = nn.Linear(config.hidden_size, sum(self.split_sizes))
        self.output_norm = nn.LayerNorm(heads * dv, eps=config.layer_norm_eps)
        self.o_proj = nn.Linear(3 * heads * dv, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, layout: JaggedLayout, visibility: Visibility, divisors: Tensor, keys: Tensor | None
    ) -> Tensor:
        """hidden_states [N, D], divisors [N], keys int64 [N] or None -> [N, D]."""
        u, v, q, k = self.uvqk_proj(self.input_norm(hidden_states)).split(self.split_sizes, dim=-1)
        u, heads = F.silu(u), self.config.num_attention_heads
        attended = SILU_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            *(x.unflatten(-1, (heads, -1)) for x in (q, k, v)),
            layout,
            visibility,
            divisors=divisors,
            scale=1 / math.sqrt(self.config.attention_head_dim),
        ).flatten(1)
        output = torch.cat([u, attended, u * self.output_norm(attended)], dim=-1)
        if keys is not None:
            output = keyed_dropout(output, self.config.hidden_dropout, keys, self.dropout_site)
        return self.o_proj(output) + hidden_states


class DLRMHSTUPreTrainedModel(RankingPreTrainedModel):
    config: DLRMHSTUConfig
    _no_split_modules = ["STULayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1 / math.sqrt(module.embedding_dim))


class DLRMHSTUModel(DLRMHSTUPreTrainedModel, RankingBackbone):
    """The backbone: contextual tokens, history and candidates of each user -> one vector per candidate.

    Args:
        config: hyperparameters.
        embedding_backend: of the tables, see `DynamicEmbeddingCollection`.
    """

    def __init__(self, config: DLRMHSTUConfig, *, embedding_backend: str = "auto") -> None:
        super().__init__(config, embedding_backend=embedding_backend)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.time_embedding = nn.Embedding(config.num_time_buckets, config.hidden_size)
        self.layers = nn.ModuleList(STULayer(config, index) for index in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(self, batch: RankingBatch, embeddings: Mapping[str, Tensor]) -> Tensor:
        """[C, D] for the C candidates; with dropout where the batch holds keys."""
        num_user_tokens = self.features.num_user_tokens
        layout, places = token_order(batch, num_user_tokens)
        order = torch.empty_like(places).scatter_(0, places, torch.arange(len(places), device=places.device))
        earlier = events_before(batch)
        contextual, events, candidates = self.features(batch, embeddings)
        events = self._encoded(events, packed_positions(batch.layout), batch, None)
        candidates = self._encoded(candidates, earlier, batch, earlier)
        tokens = torch.cat([contextual, events, candidates]).index_select(0, order)
        keys = dropout_keys(batch, num_user_tokens)
        if keys is not None:
            keys = keys.index_select(0, order)
            tokens = keyed_dropout(tokens, self.config.hidden_dropout, keys, site=0)
        visibility = self._visibility(batch, contextual.shape[0], earlier, order)
        divisors = torch.full((len(places),), float(self.config.max_position_embeddings), device=tokens.device)
        for layer in self.layers:
            tokens = layer(tokens, layout, visibility, divisors, keys)
        return self.final_norm(tokens.index_select(0, places[len(places) - batch.candidates.num_tokens :]))

    def _encoded(self, tokens: Tensor, positions: Tensor, batch: RankingBatch, earlier: Tensor | None) -> Tensor:
        """Tokens * sqrt(D) + the vector of their position + that of the time since the event before."""
        if earlier is None:
            times = batch.timestamps
            before = torch.cat([times[:1], times[:-1]])
            gap = (times - before).masked_fill(positions == 0, 0)
        else:
            last = batch.layout.cu_seq_lens[candidate_owners(batch)] + earlier - 1
            known = batch.timestamps[last.clamp(min=0)] if len(batch.timestamps) else last
            gap = (batch.candidate_timestamps - known).masked_fill(earlier == 0, 0)
        roots = (gap.double() / self.config.time_bucket_seconds).sqrt()
        buckets = roots.long().clamp(0, self.config.num_time_buckets - 1)
        return (
            tokens * math.sqrt(self.config.hidden_size)
            + self.position_embedding(positions)
            + self.time_embedding(buckets)
        )

    def _visibility(self, batch: RankingBatch, contextual: int, earlier: Tensor, order: Tensor) -> Visibility:
        """Contextual tokens are seen by all, an event by later events and by candidates after it."""
        place = packed_positions(batch.layout) + 1
        profile = batch.input_ids.new_zeros(contextual)
        query_times = torch.cat([profile + STATIC, place, earlier + 1]).index_select(0, order)
        key_times = torch.cat([profile + ALWAYS, place, torch.full_like(earlier, NEVER)]).index_select(0, order)
        return Visibility(query_times, key_times, self.config.max_attn_len)


class DLRMHSTUForRanking(DLRMHSTUPreTrainedModel, GenRecForRanking):
    """DLRM-HSTU with one logit per candidate and task.

    Args:
        config: hyperparameters.
        embedding_backend: of the tables, see `DynamicEmbeddingCollection`.
    """

    backbone_class = DLRMHSTUModel


__all__ = ["DLRMHSTUForRanking", "DLRMHSTUModel", "DLRMHSTUPreTrainedModel", "STULayer"]
