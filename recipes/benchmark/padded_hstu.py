"""HSTU as it is usually written: the baseline of the training benchmark, from the equations of arXiv 2402.17152.

Histories are padded to the longest of the batch; scores, biases and the vectors of the negatives are materialised;
items are an `nn.Embedding` with a dense gradient. Time buckets are computed once per step and shared by the layers.
"""

import math

import torch
from grzoo.models import HSTUConfig
from grzoo.models.ops.hstu_attention.bias import position_bias, time_buckets
from torch import Tensor, nn
from torch.nn import functional as F

ACCIDENTAL = -5e4  # score of a negative that is the positive


class PaddedLayer(nn.Module):
    """`U, V, Q, K = split(silu(LN(X) W))`, `Y = Linear(dropout(LN(attention(Q, K, V)) * U)) + X`."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.config, heads = config, config.num_attention_heads
        self.split_sizes = [heads * config.linear_head_dim] * 2 + [heads * config.attention_head_dim] * 2
        self.uvqk_proj = nn.Linear(config.hidden_size, sum(self.split_sizes), bias=False)
        self.o_proj = nn.Linear(heads * config.linear_head_dim, config.hidden_size)
        self.position_bias = nn.Parameter(torch.randn(2 * config.max_position_embeddings - 1) * 0.02)
        self.time_bias = nn.Parameter(torch.randn(config.num_time_buckets) * 0.02) if config.use_time_bias else None

    def forward(self, x: Tensor, mask: Tensor, buckets: Tensor | None) -> Tensor:
        """x [B, L, D], mask [B, 1, L, L] of the pairs that are seen, buckets int64 [B, L, L] -> [B, L, D]."""
        config, length = self.config, x.shape[1]
        normed = F.layer_norm(x, x.shape[-1:], eps=config.layer_norm_eps)
        u, v, q, k = F.silu(self.uvqk_proj(normed)).split(self.split_sizes, -1)
        q, k, v = (y.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.mT + position_bias(self.position_bias, 0, length, length)
        if self.time_bias is not None:
            scores = scores + self.time_bias[buckets].unsqueeze(1)
        attended = (F.silu(scores) / config.max_position_embeddings * mask) @ v
        attended = attended.transpose(1, 2).flatten(2)
        gated = F.layer_norm(attended, attended.shape[-1:], eps=config.layer_norm_eps) * u
        return self.o_proj(F.dropout(gated, config.hidden_dropout, self.training)) + x


class PaddedHSTU(nn.Module):
    """Items are numbered from 1; 0 is padding."""

    def __init__(self, config: HSTUConfig, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Embedding(num_items + 1, config.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(PaddedLayer(config) for _ in range(config.num_hidden_layers))
        nn.init.trunc_normal_(self.items.weight, std=0.02)
        nn.init.trunc_normal_(self.position_embedding.weight, std=1 / math.sqrt(config.hidden_size))

    def forward(
        self, items: Tensor, times: Tensor | None, target_times: Tensor | None, labels: Tensor, negatives: Tensor
    ) -> Tensor:
        """Sum over the events of the softmax loss.

        Args:
            items: int64 [B, L], zeros behind each history.
            times, target_times: int64 [B, L] seconds, of each event and of the one to be predicted; None: no time bias.
            labels: int64 [B, L].
            negatives: int64 [T, N] of the events that are no padding.
        """
        config, (_, length) = self.config, items.shape
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        buckets = None
        if config.use_time_bias:
            assert times is not None and target_times is not None
            buckets = time_buckets(target_times, times, config.num_time_buckets).long()
        x = self.items(items) * math.sqrt(config.hidden_size) + self.position_embedding.weight[:length]
        x = F.dropout(x, config.hidden_dropout, self.training) * (items != 0).unsqueeze(-1)
        for layer in self.layers:
            x = layer(x, causal & (items != 0)[:, None, None, :], buckets)
        trained = items != 0
        return self._loss(x[trained], labels[trained], negatives)

    def _loss(self, hidden: Tensor, labels: Tensor, negatives: Tensor) -> Tensor:
        query = F.normalize(hidden, dim=-1, eps=1e-6)
        positive = (query * F.normalize(self.items(labels), dim=-1, eps=1e-6)).sum(-1, keepdim=True)
        vectors = F.normalize(self.items(negatives), dim=-1, eps=1e-6)  # [T, N, D]
        scores = torch.einsum("td,tnd->tn", query, vectors) / self.config.temperature
        scores = scores.masked_fill(negatives == labels.unsqueeze(-1), ACCIDENTAL)
        logits = torch.cat([positive / self.config.temperature, scores], 1)
        return F.cross_entropy(logits, torch.zeros_like(labels), reduction="sum")
