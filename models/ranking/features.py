"""Features -> tokens: one per profile feature, one per event, one per candidate with its cross features inside."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .batch import RankingBatch
from .configuration_ranking import RankingConfig


class FeatureTokens(nn.Module):
    """`U_p = Linear(row)`, `event = MLP(concat(rows, flags))`, `candidate = MLP(concat(row, flags, cross features))`.

    Rows come from the dynamic tables, flags are the sum of one vector per flag that is set.
    """

    def __init__(self, config: RankingConfig) -> None:
        super().__init__()
        self.config = config
        self.num_user_tokens = len(config.user_features or [])
        self.bits = list((config.item_features or {}).values())
        width, flags = config.embedding_dim, config.embedding_dim if self.bits else 0
        self.event_size = width * (1 + len(config.event_features or [])) + flags
        self.candidate_size = width + flags + len(config.cross_features or [])
        self.flag_proj = nn.Linear(sum(self.bits), width, bias=False) if self.bits else None
        self.user_proj = nn.Linear(width, config.hidden_size) if self.num_user_tokens else None
        self.event_mlp = _mlp(self.event_size, config.hidden_size)
        self.candidate_mlp = _mlp(self.candidate_size, config.hidden_size)

    def forward(self, batch: RankingBatch, embeddings: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Profile tokens [B * P, D], events [T, D], candidates [C, D]."""
        dtype = next(self.event_mlp.parameters()).dtype
        users = self.users(batch, embeddings).flatten(0, 1)
        profile = users.new_zeros(0, self.config.hidden_size, dtype=dtype)
        if self.user_proj is not None:
            profile = self.user_proj(users.to(dtype))
        events = self.event_mlp(self.events(batch, embeddings).to(dtype))
        return profile, events, self.candidate_mlp(self.candidates(batch, embeddings).to(dtype))

    def users(self, batch: RankingBatch, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Rows of the profile features, [B, P, embedding_dim]."""
        tables = self.config.user_tables
        if not tables:
            return torch.zeros(len(batch.layout.lengths), 0, self.config.embedding_dim, device=batch.input_ids.device)
        return torch.stack([embeddings[name] for name in tables], dim=1)

    def events(self, batch: RankingBatch, embeddings: Mapping[str, Tensor]) -> Tensor:
        """What is known of the events, [T, event_size]."""
        rows = [embeddings[name] for name in ("input_ids", *self.config.event_tables)]
        return torch.cat([*rows, *self._flags(batch.item_features)], dim=-1)

    def candidates(self, batch: RankingBatch, embeddings: Mapping[str, Tensor]) -> Tensor:
        """What is known of the candidates, [C, candidate_size]."""
        parts = [embeddings["candidate_ids"], *self._flags(batch.candidate_features), batch.cross_features]
        return torch.cat([part.float() for part in parts], dim=-1)

    def _flags(self, features: Tensor) -> list[Tensor]:
        if self.flag_proj is None:
            return []
        flags = [
            (features[:, at, None] >> torch.arange(bits, device=features.device)) & 1
            for at, bits in enumerate(self.bits)
        ]
        return [self.flag_proj(torch.cat(flags, dim=-1).to(self.flag_proj.weight.dtype))]


def _mlp(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
