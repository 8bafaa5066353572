"""SASRec (arXiv 1808.09781) and its post-LN descendants; equations and differences in this folder's README."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from grzoo.models.base import GenRecPreTrainedModel
from grzoo.models.ops.keyed_dropout import keyed_dropout
from grzoo.models.ops.sampled_bce import sampled_bce_loss
from grzoo.models.ops.softmax_attention import SOFTMAX_ATTENTION_FUNCTIONS
from grzoo.models.outputs import GenRecModelOutput
from grzoo.models.packing import JaggedLayout, dropout_keys, is_padded, pack_batch, packed_positions, unpack
from grzoo.models.retrieval_model import GenRecForRetrieval
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import capture_outputs

from .configuration_sasrec import SASRecConfig

Embeddings = Mapping[str, Tensor]


class SASRecLayer(GradientCheckpointingLayer):
    """One block: causal softmax attention and a feed-forward layer, normalised as `config.layer_norm` says."""

    def __init__(self, config: SASRecConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.dropout_sites = [1 + 3 * layer_idx + number for number in range(3)]
        width, inner = config.hidden_size, config.intermediate_size or config.hidden_size
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, layout: JaggedLayout, token_keys: Tensor | None) -> Tensor:
        """hidden_states [T, D], token_keys int64 [T] or None (no dropout) -> [T, D]."""
        x, order = hidden_states, self.config.layer_norm
        after = order in ("post", "post_final")
        query = x if after else self.attention_norm(x)
        key = query if order == "pre" else x
        x = (query if order == "original" else x) + self._attend(query, key, layout, token_keys)
        if after:
            x = self.attention_norm(x)
        inner = x if after else self.feed_forward_norm(x)
        x = (inner if order == "original" else x) + self._feed_forward(inner, token_keys)
        return self.feed_forward_norm(x) if after else x

    def _attend(self, query: Tensor, key: Tensor, layout: JaggedLayout, token_keys: Tensor | None) -> Tensor:
        heads = self.config.num_attention_heads
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(key)
        attend = SOFTMAX_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended = attend(*(x.unflatten(-1, (heads, -1)) for x in (q, k, v)), layout)
        return self._dropout(self.o_proj(attended.flatten(1)), token_keys, 0)

    def _feed_forward(self, x: Tensor, token_keys: Tensor | None) -> Tensor:
        x = self._dropout(self.activation(self.up_proj(x)), token_keys, 1)
        return self._dropout(self.down_proj(x), token_keys, 2)

    def _dropout(self, x: Tensor, token_keys: Tensor | None, number: int) -> Tensor:
        if token_keys is None:
            return x
        return keyed_dropout(x, self.config.hidden_dropout, token_keys, self.dropout_sites[number])


class SASRecPreTrainedModel(GenRecPreTrainedModel):
    config: SASRecConfig
    _no_split_modules = ["SASRecLayer"]
    _can_record_outputs = {"hidden_states": SASRecLayer}
    attention_functions = SOFTMAX_ATTENTION_FUNCTIONS
    input_module = "position_embedding"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class SASRecModel(SASRecPreTrainedModel):
    """The backbone: histories of item ids -> one vector per event.

    Args:
        config: hyperparameters.
        embedding_backend: of the tables, see `DynamicEmbeddingCollection`.
    """

    def __init__(self, config: SASRecConfig, *, embedding_backend: str = "auto") -> None:
        super().__init__(config)
        self.embedding_collection = self.new_embeddings(embedding_backend)
        self.position_embedding = nn.Embedding(config.max_sequence_length, config.hidden_size)
        self.layers = nn.ModuleList(SASRecLayer(config, index) for index in range(config.num_hidden_layers))
        # BERT's order normalises the input of the first block, the others the output of the last.
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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
        token_keys: Tensor | None = None,
        embeddings: Embeddings | None = None,
        **kwargs: Any,
    ) -> GenRecModelOutput:
        """Encode packed or padded histories; the oldest event first.

        Args:
            input_ids: int64 [1, T] packed (with `cu_seq_lens_q`) or [B, L] padded. Any int64 is an id.
            attention_mask: [B, L], non-zero at events; for padded input.
            position_ids: int64, like `input_ids`: place of each event in its sequence; from 0 when None. With
                position_alignment "end" they are shifted so that the last event has the last position.
            cu_seq_lens_q: int32 [B + 1], starts of the packed sequences and T.
            token_keys: int64, like `input_ids`: keys of the dropout masks. None in training: drawn from torch's default
                generator, so that the masks depend on the call.
            embeddings: rows of a prepared step, see `embedding_ids`. None: the model looks them up itself.
            kwargs: `output_hidden_states`, `return_dict`; other fields of a micro-batch, such as times, are not looked
                at.

        Raises:
            ValueError: for a sequence longer than `max_sequence_length`, for shapes that disagree.
        """
        fields = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q,
            token_keys=token_keys,
        )
        batch = pack_batch(fields)
        layout = self._layout(batch)
        if embeddings is None:
            embeddings = self.embeddings({"input_ids": batch["input_ids"]})
        keys = dropout_keys(batch) if self.training and self.config.hidden_dropout > 0 else None
        hidden_states = self._embed(embeddings["input_ids"].flatten(0, 1), batch.get("position_ids"), layout, keys)
        for layer in self.layers:
            hidden_states = layer(hidden_states, layout, keys)
        if self.config.layer_norm != "post":
            hidden_states = self.norm(hidden_states)
        hidden_states = hidden_states.unsqueeze(0)
        if is_padded(fields):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            hidden_states = unpack(hidden_states, mask)
        return GenRecModelOutput(last_hidden_state=hidden_states)

    def _embed(self, rows: Tensor, position_ids: Tensor | None, layout: JaggedLayout, keys: Tensor | None) -> Tensor:
        """rows [T, D] -> [T, D] in the dtype of the model: item (* sqrt(D)) + position, normalised for "post"."""
        positions = packed_positions(layout) if position_ids is None else position_ids.flatten()
        if self.config.position_alignment == "end":
            lengths = layout.cu_seq_lens.diff()
            shift = self.config.max_sequence_length - lengths
            positions = positions + torch.repeat_interleave(shift, lengths, output_size=layout.num_tokens)
        position = self.position_embedding(positions)
        scale = math.sqrt(self.config.hidden_size) if self.config.scale_items else 1.0
        embedded = (rows * scale + position).to(position.dtype)
        if self.config.layer_norm == "post":
            embedded = self.norm(embedded)
        return embedded if keys is None else keyed_dropout(embedded, self.config.hidden_dropout, keys, site=0)

    def _layout(self, batch: Mapping[str, Any]) -> JaggedLayout:
        layout = JaggedLayout.from_cu_seq_lens(batch["cu_seq_lens_q"], batch["input_ids"].shape[1])
        if layout.max_length > self.config.max_sequence_length:
            raise ValueError(
                f"A sequence has {layout.max_length} events, but max_sequence_length is "
                f"{self.config.max_sequence_length}: keep the last {self.config.max_sequence_length} events."
            )
        return layout


class SASRecForRetrieval(GenRecForRetrieval, SASRecPreTrainedModel):
    """SASRec that predicts the next item; `forward`, `encode` and `recommend` are those of `GenRecForRetrieval`.

    Args:
        config: hyperparameters.
        embedding_backend: of the tables, see `DynamicEmbeddingCollection`.

    Example:
        model = AutoModelForRetrieval.from_pretrained("path/or/hub-id")
        best = model.recommend(torch.tensor([[17, 4, 99]]), top_k=5)
    """

    def __init__(self, config: SASRecConfig, *, embedding_backend: str = "auto") -> None:
        super().__init__(config)
        self.model = SASRecModel(config, embedding_backend=embedding_backend)
        self.post_init()

    @property
    def uses_cosine(self) -> bool:
        return self.config.similarity == "cosine"

    def sampled_loss(
        self,
        query: Tensor,
        rows: Tensor,
        positive_index: Tensor,
        negative_index: Tensor,
        accidental: Tensor,
        **log_q: Tensor,
    ) -> Tensor:
        indices = (positive_index, negative_index, accidental)
        if self.config.loss == "softmax":
            return super().sampled_loss(query, rows, *indices, **log_q)
        return sampled_bce_loss(
            query,
            rows,
            *indices,
            temperature=self.config.temperature,
            positive_power=self.config.positive_power,
            normalize=self.uses_cosine,
        )


__all__ = ["SASRecForRetrieval", "SASRecLayer", "SASRecModel", "SASRecPreTrainedModel"]
