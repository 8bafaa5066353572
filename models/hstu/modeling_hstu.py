"""HSTU, the retrieval form of arXiv 2402.17152; equations and differences in this folder's README."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from grzoo.embeddings import DynamicEmbeddingCollection
from grzoo.models.base import GenRecPreTrainedModel
from grzoo.models.ops.hstu_attention import HSTU_ATTENTION_FUNCTIONS
from grzoo.models.ops.keyed_dropout import keyed_dropout
from grzoo.models.ops.norm_gate_dropout import norm_gate_dropout
from grzoo.models.ops.sampled_softmax import sampled_softmax_loss
from grzoo.models.ops.sampled_softmax.naive import l2_normalize
from grzoo.models.outputs import GenRecModelOutput, RetrievalModelOutput, RetrievalOutput
from grzoo.models.packing import (
    JaggedLayout,
    is_padded,
    keep_last,
    next_timestamps,
    pack_batch,
    packed_positions,
    unpack,
)
from grzoo.models.retrieval import ShardedCatalogue
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_hstu import HSTUConfig

Embeddings = Mapping[str, Tensor]


class HSTULayer(GradientCheckpointingLayer):
    """One block: `U, V, Q, K = split(silu(LN(X) W))`, `Y = Linear(dropout(LN(attention(Q, K, V)) * U)) + X`."""

    attention_functions = HSTU_ATTENTION_FUNCTIONS

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
        attend = AttentionInterface().get_interface(self.config._attn_implementation, _by_layer("auto"))
        attended, _ = attend(
            self,
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


def _by_layer(name: str) -> Any:
    """An entry of transformers' registry of attention functions that calls the function of this name of the layer's
    own op."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: JaggedLayout, **kwargs: Any
    ) -> tuple[Tensor, None]:
        functions = getattr(module, "attention_functions", {})
        if name not in functions:
            raise ValueError(f"attn_implementation={name!r} is not available for {type(module).__name__}.")
        return functions[name](query, key, value, layout, **kwargs), None

    return attend


for _name in ("auto", "host", "naive", "triton"):
    AttentionInterface.register(_name, _by_layer(_name))


class HSTUPreTrainedModel(GenRecPreTrainedModel):
    config: HSTUConfig
    _no_split_modules = ["HSTULayer"]
    _can_record_outputs = {"hidden_states": HSTULayer}

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        # "auto" unless one is asked for.
        name: str = super()._check_and_adjust_attn_implementation(attn_implementation or "auto", *args, **kwargs)
        return name

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
        self.embedding_collection = DynamicEmbeddingCollection(
            config.embedding_tables(),
            config.embedding_features(),
            seed=config.embedding_seed,
            backend=embedding_backend,
        )
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(HSTULayer(config, index) for index in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
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
            ValueError: for a sequence longer than `max_position_embeddings`, for missing timestamps, for shapes that
            disagree.
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
        keys = self._dropout_keys(batch)
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
            layout.target_timestamps = (
                next_timestamps(layout, layout.timestamps, None) if target is None else target.flatten()
            )
        return layout

    def _dropout_keys(self, batch: Mapping[str, Any]) -> Tensor | None:
        if not self.training or self.config.hidden_dropout == 0:
            return None
        if batch.get("token_keys") is not None:
            return batch["token_keys"].flatten()
        ids = batch["input_ids"]
        return torch.randint(-(2**63), 2**63 - 1, (ids.shape[1],), device=ids.device)


class HSTUForRetrieval(HSTUPreTrainedModel):
    """HSTU that predicts the next item: sampled softmax in training, top-k over a catalogue in inference.

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

    def embedding_ids(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        batch = pack_batch(batch)
        ids = {"input_ids": batch["input_ids"]}
        if "labels" in batch and "negative_ids" in batch:
            labels, negatives, _ = self._trained(batch)
            ids |= {"labels": labels, "negative_ids": negatives}
        return ids

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        labels: Tensor | None = None,
        label_mask: Tensor | None = None,
        negative_ids: Tensor | None = None,
        label_log_q: Tensor | None = None,
        negative_log_q: Tensor | None = None,
        embeddings: Embeddings | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> RetrievalModelOutput:
        """`HSTUModel.forward` (its arguments too), and the loss when labels and negatives are given.

        Args:
            labels: int64, like `input_ids`: id of the event after each one; any value where it is masked.
            label_mask: bool, like `input_ids`: which tokens are trained; None: all.
            negative_ids: int64 [1, T, N] or [B, L, N] for negative_sampling "uniform", [N] for "shared".
            label_log_q: float32 like `input_ids`, negative_log_q: float32 [N]: log probabilities of being drawn;
                needed for "shared".
            embeddings: rows of a prepared step, see `embedding_ids`.
            num_items_in_batch: trained tokens of the whole step, over all micro-batches and ranks: what the sum is
                divided by. None: the trained tokens of this call.

        Raises:
            ValueError: for labels without negatives in training, for negatives of the other kind, and as
            `HSTUModel.forward`.
        """
        fields = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q,
            labels=labels,
            label_mask=label_mask,
            negative_ids=negative_ids,
            label_log_q=label_log_q,
            negative_log_q=negative_log_q,
            **{name: kwargs.pop(name, None) for name in ("timestamps", "target_timestamps", "token_keys")},
        )
        batch = pack_batch(fields)
        if self.training and labels is not None and negative_ids is None:
            raise ValueError("labels are given without negative_ids: give the collator `negatives`, or call eval().")
        if embeddings is None:
            embeddings = self.embeddings(self.embedding_ids(batch))
        output = self.model(**{name: batch.get(name) for name in _MODEL_FIELDS}, embeddings=embeddings, **kwargs)
        hidden = output.last_hidden_state
        loss = None
        if "labels" in batch and "negative_ids" in batch:
            loss = self._loss(batch, hidden[0], embeddings, num_items_in_batch)
        query = l2_normalize(hidden)
        if is_padded(fields):
            query = unpack(query, torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        return RetrievalModelOutput(loss=loss, query_embeddings=query, hidden_states=output.hidden_states)

    def _trained(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Labels [T'], negatives [T', N] or [N], and the mask [T] that selects the T' trained tokens (None: all)."""
        labels, negatives = batch["labels"].flatten(), batch["negative_ids"]
        expected = 3 if self.config.negative_sampling == "uniform" else 1
        if negatives.dim() != expected:
            raise ValueError(
                f"negative_sampling is {self.config.negative_sampling!r}, so negative_ids must have {expected} "
                f"dimensions; got shape {tuple(negatives.shape)}. Sample as the config says, or change the config."
            )
        mask = batch.get("label_mask")
        if mask is not None and not bool(mask.all()):
            mask = mask.flatten().bool()
            return labels[mask], negatives[0][mask] if expected == 3 else negatives, mask
        return labels, negatives[0] if expected == 3 else negatives, None

    def _loss(
        self, batch: Mapping[str, Any], hidden: Tensor, embeddings: Embeddings, num_items_in_batch: int | Tensor | None
    ) -> Tensor:
        labels, negatives, mask = self._trained(batch)
        log_q = {}
        if self.config.negative_sampling == "shared":
            if "label_log_q" not in batch or "negative_log_q" not in batch:
                raise ValueError(
                    "Shared negatives need label_log_q [1, T] and negative_log_q [N]: let the collator draw them."
                )
            label_log_q = batch["label_log_q"].flatten()
            log_q["positive_log_q"] = label_log_q if mask is None else label_log_q[mask]
            log_q["negative_log_q"] = batch["negative_log_q"]
        rows, positive_index = embeddings.rows("labels")  # type: ignore[attr-defined]
        _, negative_index = embeddings.rows("negative_ids")  # type: ignore[attr-defined]
        total = sampled_softmax_loss(
            hidden if mask is None else hidden[mask],
            rows,
            positive_index,
            negative_index,
            negatives == labels.unsqueeze(1),
            temperature=self.config.temperature,
            **log_q,
        )
        return total / (max(1, labels.numel()) if num_items_in_batch is None else num_items_in_batch)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seq_lens_q: Tensor | None = None,
        timestamps: Tensor | None = None,
        target_timestamps: Tensor | None = None,
        request_timestamps: Tensor | None = None,
        embeddings: Embeddings | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Query vectors of users: the normalised output at the last event of each history.

        Arguments as in `HSTUModel.forward`, and:
            request_timestamps: int64 [B] seconds, when each user asks. None: `target_timestamps` if given, else the
                time of the last event.

        Without `embeddings`, histories are cut to their last `max_sequence_length` events. Nothing is inserted, nothing
        dropped out, whatever the mode; ids without a row get what `unknown_items` says. Collective when the tables
        are sharded.

        Returns:
            float32 [B, D].

        Raises:
            ValueError: for an empty history, and as `HSTUModel.forward`.
        """
        batch = pack_batch(
            dict(
                input_ids=input_ids,
                attention_mask=attention_mask,
                cu_seq_lens_q=cu_seq_lens_q,
                timestamps=timestamps,
                target_timestamps=target_timestamps,
            )
        )
        if embeddings is None:
            batch = keep_last(batch, self.config.max_sequence_length)
        layout = JaggedLayout.from_cu_seq_lens(batch["cu_seq_lens_q"], batch["input_ids"].shape[1])
        empty = [user for user, length in enumerate(layout.lengths) if length == 0]
        if empty:
            raise ValueError(
                f"The history of user {empty[0]} of this batch is empty: there is nothing to recommend from. Leave "
                "such users out, and show them popular items."
            )
        if request_timestamps is not None and timestamps is not None:
            batch["target_timestamps"] = next_timestamps(
                layout, batch["timestamps"].flatten(), request_timestamps
            ).unsqueeze(0)
        with self.inference():
            if embeddings is None:
                embeddings = self.embeddings({"input_ids": batch["input_ids"]}, insert=False)
            hidden = self.model(
                **{name: batch.get(name) for name in _MODEL_FIELDS}, embeddings=embeddings
            ).last_hidden_state
            return l2_normalize(hidden[0].index_select(0, layout.cu_seq_lens[1:] - 1).float())

    def item_embeddings(self, ids: Tensor) -> Tensor:
        """Normalised vectors of items, read only: int64 [n] -> float32 [n, D]. Collective when tables are sharded."""
        with self.inference():
            return l2_normalize(self.embeddings({"candidate_ids": ids}, insert=False)["candidate_ids"])

    def recommend(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        top_k: int = 10,
        candidates: Tensor | ShardedCatalogue | None = None,
        exclude_seen: bool = True,
        **history: Any,
    ) -> RetrievalOutput:
        """The k best items for each user, by cosine of query and item, ties to the smaller id.

        Args:
            input_ids, attention_mask, history: as in `encode` (`timestamps`, `request_timestamps`, `cu_seq_lens_q`,
                ...).
            candidates: int64 item ids; None: all rows of the table. Who asks often builds a `ShardedCatalogue` once
                and passes it.
            exclude_seen: leave out the items of the history, all of it.

        Raises:
            ValueError: when there are fewer than `top_k` candidates, for a field of the history that is not known,
                and as `encode`.
        """
        if unknown := sorted(set(history) - _HISTORY_FIELDS):
            raise ValueError(f"recommend() does not take {unknown}; a history has {sorted(_HISTORY_FIELDS)}.")
        if not isinstance(candidates, ShardedCatalogue):
            candidates = ShardedCatalogue(self, candidates, self.embeddings.process_group)
        queries = self.encode(input_ids, attention_mask, **history)
        seen = None
        if exclude_seen:
            packed = pack_batch(
                {
                    "input_ids": input_ids,
                    "attention_mask": attention_mask,
                    "cu_seq_lens_q": history.get("cu_seq_lens_q"),
                }
            )
            seen = packed["input_ids"].flatten(), packed["cu_seq_lens_q"].long()
        return RetrievalOutput(*candidates.top_k(queries, top_k, seen))


_HISTORY_FIELDS = {
    "position_ids",
    "cu_seq_lens_q",
    "max_length_q",
    "timestamps",
    "target_timestamps",
    "request_timestamps",
    "embeddings",
}
_MODEL_FIELDS = ("input_ids", "position_ids", "cu_seq_lens_q", "timestamps", "target_timestamps", "token_keys")

__all__ = ["HSTUForRetrieval", "HSTULayer", "HSTUModel", "HSTUPreTrainedModel"]
