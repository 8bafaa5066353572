"""MTGR of arXiv 2505.18654; equations and differences in this folder's README."""

from collections.abc import Mapping

import torch
from grzoo.models.ops.keyed_dropout import keyed_dropout
from grzoo.models.ops.silu_attention import ALWAYS, NEVER, SILU_ATTENTION_FUNCTIONS, STATIC, Visibility
from grzoo.models.packing import JaggedLayout
from grzoo.models.ranking import GenRecForRanking, RankingBackbone, RankingBatch, RankingPreTrainedModel, token_order
from grzoo.models.ranking.keys import dropout_keys
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_mtgr import MTGRConfig

NUM_GROUPS = 4  # profile, long-term history, real-time history, candidates


class GroupLayerNorm(nn.Module):
    """LayerNorm with parameters of its own for each group of tokens."""

    def __init__(self, hidden_size: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_groups, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_groups, hidden_size))

    def forward(self, hidden_states: Tensor, groups: Tensor) -> Tensor:
        """hidden_states [N, D], groups one-hot [N, num_groups] -> [N, D]."""
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)
        # One-hot products instead of indexing: their gradients are deterministic on every device.
        return normed * (groups @ self.weight) + groups @ self.bias


class MTGRLayer(GradientCheckpointingLayer):
    """`X~ = GroupLN(X); K, Q, V, U = Linear(X~); X + Linear(dropout(GroupLN(attention(Q, K, V) * U)))`."""

    def __init__(self, config: MTGRConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.dropout_site = 1 + layer_idx
        width, groups = config.hidden_size, NUM_GROUPS if config.use_group_norm else 1
        self.input_norm = GroupLayerNorm(width, groups, config.layer_norm_eps)
        self.qkvu_proj = nn.Linear(width, 4 * width)
        self.output_norm = GroupLayerNorm(width, groups, config.layer_norm_eps)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self,
        hidden_states: Tensor,
        groups: Tensor,
        layout: JaggedLayout,
        visibility: Visibility,
        divisors: Tensor,
        keys: Tensor | None,
    ) -> Tensor:
        """hidden_states [N, D], groups one-hot [N, groups], divisors [N], keys int64 [N] or None -> [N, D]."""
        q, k, v, u = self.qkvu_proj(self.input_norm(hidden_states, groups)).chunk(4, dim=-1)
        heads = self.config.num_attention_heads
        attend = SILU_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended = attend(
            *(x.unflatten(-1, (heads, -1)) for x in (q, k, v)), layout, visibility, divisors=divisors
        ).flatten(1)
        gated = self.output_norm(attended * u, groups)
        if keys is not None:
            gated = keyed_dropout(gated, self.config.hidden_dropout, keys, self.dropout_site)
        return self.o_proj(gated) + hidden_states


class MTGRPreTrainedModel(RankingPreTrainedModel):
    config: MTGRConfig
    _no_split_modules = ["MTGRLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GroupLayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class MTGRModel(MTGRPreTrainedModel, RankingBackbone):
    """The backbone: profile, history and candidates of each user as one sequence -> one vector per candidate.

    Args:
        config: hyperparameters.
        embedding_backend: of the tables, see `DynamicEmbeddingCollection`.
    """

    def __init__(self, config: MTGRConfig, *, embedding_backend: str = "auto") -> None:
        super().__init__(config, embedding_backend=embedding_backend)
        self.layers = nn.ModuleList(MTGRLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, batch: RankingBatch, embeddings: Mapping[str, Tensor]) -> Tensor:
        """[C, D] for the C candidates; with dropout where the batch holds keys."""
        num_user_tokens = self.features.num_user_tokens
        layout, places = token_order(batch, num_user_tokens)
        order = torch.empty_like(places).scatter_(0, places, torch.arange(len(places), device=places.device))
        tokens = torch.cat(self.features(batch, embeddings)).index_select(0, order)
        keys = dropout_keys(batch, num_user_tokens)
        if keys is not None:
            keys = keys.index_select(0, order)
            tokens = keyed_dropout(tokens, self.config.hidden_dropout, keys, site=0)
        groups = self._groups(batch, num_user_tokens).index_select(0, order).to(tokens.dtype)
        visibility = self._visibility(batch, num_user_tokens, order)
        divisors = _divisors(visibility, layout)
        for layer in self.layers:
            tokens = layer(tokens, groups, layout, visibility, divisors, keys)
        return tokens.index_select(0, places[len(places) - batch.candidates.num_tokens :])

    def _groups(self, batch: RankingBatch, num_user_tokens: int) -> Tensor:
        """One-hot [N, 4] of profile, long-term, real-time, candidate ([N, 1] without GroupLN), before ordering."""
        profile = torch.zeros(
            len(batch.layout.lengths) * num_user_tokens, dtype=torch.int64, device=batch.input_ids.device
        )
        group = torch.cat([profile, 1 + batch.is_recent.long(), torch.full_like(batch.candidate_ids, 3)])
        return F.one_hot(group, NUM_GROUPS) if self.config.use_group_norm else torch.ones_like(group).unsqueeze(1)

    def _visibility(self, batch: RankingBatch, num_user_tokens: int, order: Tensor) -> Visibility:
        """Profile and long-term tokens are seen by all; a real-time event by what is later; a candidate by none."""
        seen_from, looks_at, is_recent = batch.timestamps, batch.timestamps, batch.is_recent
        if not self.config.use_dynamic_mask:
            owner = torch.repeat_interleave(batch.layout.cu_seq_lens.diff(), output_size=batch.layout.num_tokens)
            is_early = batch.timestamps < batch.first_candidate_times[owner]
            seen_from = torch.full_like(batch.timestamps, NEVER).masked_fill(is_early, ALWAYS)
            looks_at = torch.full_like(batch.timestamps, STATIC)
        profile = batch.input_ids.new_zeros(len(batch.layout.lengths) * num_user_tokens)
        query_times = [profile + STATIC, looks_at.masked_fill(~is_recent, STATIC), batch.candidate_timestamps]
        key_times = [
            profile + ALWAYS,
            seen_from.masked_fill(~is_recent, ALWAYS),
            torch.full_like(batch.candidate_ids, NEVER),
        ]
        return Visibility(torch.cat(query_times).index_select(0, order), torch.cat(key_times).index_select(0, order))


def _divisors(visibility: Visibility, layout: JaggedLayout) -> Tensor:
    """float32 [N]: tokens that each token sees, so that neither other candidates nor its future change a score."""
    lengths = layout.cu_seq_lens.diff()
    samples = torch.arange(len(lengths), device=lengths.device)
    sample = torch.repeat_interleave(samples, lengths, output_size=layout.num_tokens)
    times = torch.cat([visibility.query_times, visibility.key_times])
    # Times as ranks: sample and time then fit in one number, and one sorted search serves all samples.
    ranks = times.unique(return_inverse=True)[1] + sample.repeat(2) * len(times)
    queries, keys = ranks.chunk(2)
    seen = torch.searchsorted(keys.sort().values, queries) - layout.cu_seq_lens[sample]
    return (seen + visibility.only_itself()).float()


class MTGRForRanking(MTGRPreTrainedModel, GenRecForRanking):
    """MTGR with one logit per candidate and task.

    Args:
        config: hyperparameters.
        embedding_backend: of the tables, see `DynamicEmbeddingCollection`.

    Example:
        model = AutoModelForRanking.from_pretrained("path/or/hub-id")
        probabilities = model.score(history, candidates, timestamps=times, candidate_timestamps=now, ...)
    """

    backbone_class = MTGRModel


__all__ = ["MTGRForRanking", "MTGRLayer", "MTGRModel", "MTGRPreTrainedModel"]
