"""The frame of the ranking models: a batch in, one logit per candidate and task out."""

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from grzoo.models.base import GenRecPreTrainedModel
from grzoo.models.ops.silu_attention import SILU_ATTENTION_FUNCTIONS
from grzoo.models.outputs import RankingModelOutput
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .batch import RankingBatch, check_names
from .configuration_ranking import RankingConfig
from .features import FeatureTokens
from .heads import MultiTaskHead, multi_task_loss

Embeddings = Mapping[str, Tensor]


class RankingPreTrainedModel(GenRecPreTrainedModel):
    """Base of the backbones and of the models with a head."""

    config: RankingConfig
    attention_functions = SILU_ATTENTION_FUNCTIONS
    input_module = "features"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)

    def embedding_ids(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return self._ids(RankingBatch.from_fields(batch, self.config))

    def _ids(self, batch: RankingBatch) -> dict[str, Tensor]:
        ids = {"input_ids": batch.input_ids, "candidate_ids": batch.candidate_ids}
        ids |= {name: batch.user_features[:, at] for at, name in enumerate(self.config.user_tables)}
        return ids | {name: batch.event_features[:, at] for at, name in enumerate(self.config.event_tables)}


class RankingBackbone(RankingPreTrainedModel):
    """Tables, feature tokens and what an architecture makes of them.

    Args:
        config: hyperparameters.
        embedding_backend: of the tables, see `DynamicEmbeddingCollection`.
    """

    def __init__(self, config: RankingConfig, *, embedding_backend: str = "auto") -> None:
        super().__init__(config)
        self.embedding_collection = self.new_embeddings(embedding_backend)
        self.features = FeatureTokens(config)

    @property
    def output_size(self) -> int:
        """Width of what `forward` returns."""
        return self.config.hidden_size

    @abstractmethod
    def forward(self, batch: RankingBatch, embeddings: Embeddings) -> Tensor:
        """One vector per candidate, [C, output_size]; with dropout where the batch holds keys."""


class GenRecForRanking(RankingPreTrainedModel):
    """A backbone with one logit per candidate and task, trained by binary cross-entropy."""

    backbone_class: type[RankingBackbone]

    def __init__(self, config: RankingConfig, *, embedding_backend: str = "auto") -> None:
        super().__init__(config)
        self.model = self.backbone_class(config, embedding_backend=embedding_backend)
        self.head = MultiTaskHead(self.model.output_size, len(config.tasks or []))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        candidate_ids: Tensor,
        timestamps: Tensor | None = None,
        candidate_timestamps: Tensor | None = None,
        attention_mask: Tensor | None = None,
        candidate_mask: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_candidates: Tensor | None = None,
        num_recent: Tensor | None = None,
        user_features: Tensor | None = None,
        event_features: Tensor | None = None,
        item_features: Tensor | None = None,
        candidate_features: Tensor | None = None,
        cross_features: Tensor | None = None,
        labels: Tensor | None = None,
        label_mask: Tensor | None = None,
        token_keys: Tensor | None = None,
        candidate_keys: Tensor | None = None,
        user_keys: Tensor | None = None,
        embeddings: Embeddings | None = None,
        num_items_in_batch: int | Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> RankingModelOutput:
        """Logits of B users' candidates, and the loss when there are labels.

        Args:
            input_ids: int64 [1, T] packed (with `cu_seq_lens_q`) or [B, L] padded: items of the histories, the oldest
                event first. A history may be empty: a cold user.
            candidate_ids: int64 [1, C] packed (with `cu_seq_lens_candidates`) or [B, K] padded. Any int64 is an id.
            timestamps, candidate_timestamps: int64 seconds, like the ids.
            attention_mask, candidate_mask: [B, L] and [B, K], non-zero at events and candidates; for padded input.
            cu_seq_lens_q, cu_seq_lens_candidates: int32 [B + 1].
            num_recent: int64 [B], how many of a history's last events are its real-time part: a token sees them only
                if it is later. All earlier events are seen by every candidate, so they must precede them. None: the
                config's number before the user's first candidate and all events after that; all, if the config says
                nothing.
            user_features: int64 [B, P] ids, in the order of the config's names, as the following.
            event_features: int64 [..., E] ids, beside `input_ids`.
            item_features, candidate_features: int64 [..., M] bits, beside `input_ids` and `candidate_ids`.
            cross_features: float32 [..., F], beside `candidate_ids`.
            labels: float [..., tasks], beside `candidate_ids`.  label_mask: bool, which are known; None: all.
            token_keys, candidate_keys, user_keys: int64 beside the ids and [B], keys of the dropout masks. None in
                training: drawn from torch's default generator.
            embeddings: rows of a prepared step, see `embedding_ids`. None: the model looks them up itself.
            num_items_in_batch: known labels of the whole step, one number per task. None: those of this call.
            kwargs: `return_dict`; other fields of a micro-batch are not looked at.

        Raises:
            ValueError: for a history longer than `max_sequence_length`, missing features, times that are missing,
            negative or unsorted, long-term events that are not before the candidates, dense features that are not
            finite, known labels outside [0, 1], a denominator below 1, shapes and dtypes that disagree.
        """
        _warn_of_unrecorded(self.config, kwargs)
        given = dict(
            input_ids=input_ids,
            candidate_ids=candidate_ids,
            timestamps=timestamps,
            candidate_timestamps=candidate_timestamps,
            attention_mask=attention_mask,
            candidate_mask=candidate_mask,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_candidates=cu_seq_lens_candidates,
            num_recent=num_recent,
            user_features=user_features,
            event_features=event_features,
            item_features=item_features,
            candidate_features=candidate_features,
            cross_features=cross_features,
            labels=labels,
            label_mask=label_mask,
            token_keys=token_keys,
            candidate_keys=candidate_keys,
            user_keys=user_keys,
        )
        batch = RankingBatch.from_fields(given, self.config)
        if batch.layout.max_length > self.config.max_sequence_length:
            raise ValueError(
                f"A history has {batch.layout.max_length} events, but max_sequence_length is "
                f"{self.config.max_sequence_length}: keep the last ones, as `score` does."
            )
        return self._run(batch, embeddings, num_items_in_batch, _places(candidate_ids, candidate_mask, given))

    def _run(
        self,
        batch: RankingBatch,
        embeddings: Embeddings | None,
        num_items_in_batch: int | Sequence[int] | Tensor | None,
        places: Tensor | None,
    ) -> RankingModelOutput:
        if embeddings is None:
            embeddings = self.embeddings(self._ids(batch))
        drops_out = self.training and self.config.hidden_dropout > 0
        batch = batch.with_keys() if drops_out else batch.without_keys()
        logits = self.head(self.model(batch, embeddings))
        loss = None
        if batch.labels is not None:
            loss = multi_task_loss(logits, batch.labels, batch.label_mask, num_items_in_batch)
        return RankingModelOutput(loss=loss, logits=_unpack(logits, places))

    def score(self, input_ids: Tensor, candidate_ids: Tensor, **fields: Any) -> Tensor:
        """Probability of each task for each candidate: float32 [1, C, tasks] or [B, K, tasks]; zero at padding.

        Arguments as the fields of a batch in `forward`; labels and keys are not looked at. Histories are cut to their
        last `max_sequence_length` events. Nothing is inserted, nothing dropped out, whatever the mode. Collective when
        the tables are sharded.

        Raises:
            ValueError: as `forward`, and for an argument that no batch has.
        """
        check_names(fields)
        given = {**fields, "input_ids": input_ids, "candidate_ids": candidate_ids}
        batch = RankingBatch.from_fields(given, self.config)
        batch = batch.keep_last(self.config.max_sequence_length).without_keys()
        with self.inference():
            embeddings = self.embeddings(self._ids(batch), insert=False)
            probabilities = self.head(self.model(batch, embeddings)).sigmoid()
        return _unpack(probabilities, _places(candidate_ids, fields.get("candidate_mask"), given))


def _warn_of_unrecorded(config: RankingConfig, asked: Mapping[str, Any]) -> None:
    for name in ("output_hidden_states", "output_attentions"):
        if asked.get(name, getattr(config, name, False)):
            warnings.warn(f"{name} has no effect: ranking models return loss and logits only.", stacklevel=3)


def _places(candidate_ids: Tensor, candidate_mask: Tensor | None, given: Mapping[str, Any]) -> Tensor | None:
    """bool [B, K] of a padded batch, None for a packed one."""
    if given.get("cu_seq_lens_candidates") is not None:
        return None
    return torch.ones_like(candidate_ids, dtype=torch.bool) if candidate_mask is None else candidate_mask.bool()


def _unpack(values: Tensor, places: Tensor | None) -> Tensor:
    """[C, tasks] -> [1, C, tasks], or [B, K, tasks]."""
    if places is None:
        return values.unsqueeze(0)
    return values.new_zeros(*places.shape, values.shape[-1]).masked_scatter(places.unsqueeze(-1), values)


__all__ = ["GenRecForRanking", "RankingBackbone", "RankingPreTrainedModel"]
