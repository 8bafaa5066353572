"""HSTU, the retrieval form of arXiv 2402.17152; equations and differences in this folder's README."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from grzoo.models.base import GenRecPreTrainedModel
from grzoo.models.ops.hstu_attention import HSTU_ATTENTION_FUNCTIONS
from grzoo.models.ops.keyed_dropout import keyed_dropout
from grzoo.models.ops.norm_gate_dropout import norm_gate_dropout
from grzoo.models.outputs import GenRecModelOutput
from grzoo.models.packing import (
    JaggedLayout,
    check_times,
    dropout_keys,
    is_padded,
    next_timestamps,
    pack_batch,
    packed_positions,
    unpack,
)
from grzoo.models.retrieval_model import GenRecForRetrieval
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import capture_outputs

from .configuration_hstu import HSTUConfig

Embeddings = Mapping[str, Tensor]


class HSTULayer(GradientCheckpointingLayer):
    """One block: `U, V, Q, K = split(silu(LN(X) W))`, `Y = Linear(dropout(LN(attention(Q, K, V)) * U)) + X`."""

    def __init__(self, config: HSTUConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.dropout_site = 1 + layer_idx
        heads, dv, dqk = config.num_attention_heads, config.linear_head_dim, config.attention_head_dim
        self.split_sizes = [heads * dv, heads * dv, heads * dqk, heads * dqk]
        self.uvqk_proj = nn.Linear(config.hidden_size, sum(self.split_sizes), bias=False)
        self.o_proj = nn.Linear(heads * dv, config.hidden_size)
        self.position_bias = nn.Parameter(torch.empty(2 * config.max_position_embeddings - 1))
        self.time_bias = nn.Parameter(torch.empty(config.num_time_buckets)) if config.use_time_bias else None

    def forward(self, hidden_states: Tensor, layout: JaggedLayout, token_keys: Tensor | None) -> Tensor:
        """hidden_states [T, D], token_keys int64 [T] or None (no dropout) -> [T, D]."""
        heads = self.config.num_attention_heads
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.config.layer_norm_eps)
        u, v, q, k = F.silu(self.uvqk_proj(normed)).split(self.split_sizes, dim=-1)
        attended = HSTU_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            *(x.unflatten(-1, (heads, -1)) for x in (q, k, v)),
            layout,
            max_length=self.config.max_position_embeddings,
            position_table=self.position_bias,
            time_table=self.time_bias,
        )
        attended = attended.flatten(1)
        gated = norm_gate_dropout(
            attended,
            u,
            eps=self.config.layer_norm_eps,
            p=self.config.hidden_dropout,
            token_keys=token_keys,
            site=self.dropout_site,
        )
        return self.o_proj(gated) + hidden_states


class HSTUPreTrainedModel(GenRecPreTrainedModel):
    config: HSTUConfig
    _no_split_modules = ["HSTULayer"]
    _can_record_outputs = {"hidden_states": HSTULayer}
    attention_functions = HSTU_ATTENTION_FUNCTIONS
    input_module = "position_embedding"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, HSTULayer):
            init.normal_(module.uvqk_proj.weight, std=std)
            init.xavier_uniform_(module.o_proj.weight)
            bound = 1 / math.sqrt(module.o_proj.in_features)
            init.uniform_(module.o_proj.bias, -bound, bound)
            init.normal_(module.position_bias, std=std)
            if module.time_bias is not None:
                init.normal_(module.time_bias, std=std)
        elif isinstance(module, nn.Embedding):
            width = 1 / math.sqrt(module.embedding_dim)
            init.trunc_normal_(module.weight, std=width, a=-2 * width, b=2 * width)


class HSTUModel(HSTUPreTrainedModel):
    """The backbone: histories of item ids -> one vector per event.

    Args:
        config: hyperparameters.
        embedding_backend: of the tables, see `DynamicEmbeddingCollection`.
    """

    def __init__(self, config: HSTUConfig, *, embedding_backend: str = "auto") -> None:
        super().__init__(config)
        self.embedding_collection = self.new_embeddings(embedding_backend)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(HSTULayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    def embedding_ids(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"input_ids": pack_batch(batch)["input_ids"]}

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        timestamps: Tensor | None = None,
        target_timestamps: Tensor | None = None,
        token_keys: Tensor | None = None,
        embeddings: Embeddings | None = None,
        **kwargs: Any,
    ) -> GenRecModelOutput:
        """Encode packed or padded histories; the oldest event first.

        Args:
            input_ids: int64 [1, T] packed (with `cu_seq_lens_q`) or [B, L] padded. Any int64 is an id.
            attention_mask: [B, L], non-zero at events; for padded input.
            position_ids: int64, like `input_ids`; from 0 in each sequence when None.
            cu_seq_lens_q: int32 [B + 1], starts of the packed sequences and T.
            timestamps: int64 seconds, like `input_ids`: time of each event. Needed with `use_time_bias`.
            target_timestamps: int64 seconds, like `input_ids`: time of the event after each one. None: that of the
                next event in the sequence, and at its end that of the last event.
            token_keys: int64, like `input_ids`: keys of the dropout masks. None in training: drawn from torch's default
                generator, so that the masks depend on the call.
            embeddings: rows of a prepared step, see `embedding_ids`. None: the model looks them up itself.
            kwargs: `output_hidden_states`, `return_dict`; other fields of a micro-batch are not looked at.

        Raises:
            ValueError: for a sequence longer than `max_position_embeddings`, for timestamps that are missing,
            negative, unsorted or no whole seconds, for target times before their events, for shapes that disagree.
        """
        names = (
            "input_ids",
            "attention_mask",
            "position_ids",
            "cu_seq_lens_q",
            "timestamps",
            "target_timestamps",
            "token_keys",
        )
        given = (input_ids, attention_mask, position_ids, cu_seq_lens_q, timestamps, target_timestamps, token_keys)
        batch = pack_batch(dict(zip(names, given, strict=True)))
        layout = self._layout(batch)
        if embeddings is None:
            embeddings = self.embeddings({"input_ids": batch["input_ids"]})
        keys = dropout_keys(batch) if self.training and self.config.hidden_dropout > 0 else None
        hidden_states = self._embed(embeddings["input_ids"].flatten(0, 1), batch.get("position_ids"), layout, keys)
        for layer in self.layers:
            hidden_states = layer(hidden_states, layout, keys)
        hidden_states = hidden_states.unsqueeze(0)
        if is_padded({"cu_seq_lens_q": cu_seq_lens_q}):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            hidden_states = unpack(hidden_states, mask)
        return GenRecModelOutput(last_hidden_state=hidden_states)

    def _embed(self, rows: Tensor, position_ids: Tensor | None, layout: JaggedLayout, keys: Tensor | None) -> Tensor:
        """rows [T, D] -> [T, D] in the dtype of the model: item * sqrt(D) + position, dropout."""
        positions = packed_positions(layout) if position_ids is None else position_ids.flatten()
        position = self.position_embedding(positions)
        embedded = (rows * math.sqrt(self.config.hidden_size) + position).to(position.dtype)
        return embedded if keys is None else keyed_dropout(embedded, self.config.hidden_dropout, keys, site=0)

    def _layout(self, batch: Mapping[str, Any]) -> JaggedLayout:
        num_tokens = batch["input_ids"].shape[1]
        layout = JaggedLayout.from_cu_seq_lens(batch["cu_seq_lens_q"], num_tokens)
        if layout.max_length > self.config.max_position_embeddings:
            raise ValueError(
                f"A sequence has {layout.max_length} events, but max_position_embeddings is "
                f"{self.config.max_position_embeddings}: keep the last {self.config.max_sequence_length} events "
                "(max_sequence_length)."
            )
        if self.config.use_time_bias:
            if batch.get("timestamps") is None:
                raise ValueError(
                    "timestamps are missing, and this model has a time bias (use_time_bias=True): pass `timestamps`, "
                    "or train a model with use_time_bias=False on logs without times."
                )
            layout.timestamps = batch["timestamps"].flatten()
            target = batch.get("target_timestamps")
            target = None if target is None else target.flatten()
            check_times(layout, layout.timestamps, target)
            layout.target_timestamps = next_timestamps(layout, layout.timestamps, None) if target is None else target
        return layout


class HSTUForRetrieval(GenRecForRetrieval, HSTUPreTrainedModel):
    """HSTU that predicts the next item: softmax over cosines in training, top-k over a catalogue in
    inference; `forward`, `encode` and `recommend` are those of `GenRecForRetrieval`.

    Args:
        config: hyperparameters.
        embedding_backend: of the tables, see `DynamicEmbeddingCollection`.

    Example:
        model = AutoModelForRetrieval.from_pretrained("path/or/hub-id")
        best = model.recommend(torch.tensor([[17, 4, 99]]), timestamps=torch.tensor([[100, 160, 300]]), top_k=5)
    """

    def __init__(self, config: HSTUConfig, *, embedding_backend: str = "auto") -> None:
        super().__init__(config)
        self.model = HSTUModel(config, embedding_backend=embedding_backend)
        self.post_init()


__all__ = ["HSTUForRetrieval", "HSTULayer", "HSTUModel", "HSTUPreTrainedModel"]
