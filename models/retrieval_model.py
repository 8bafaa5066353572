"""What all models for retrieval share: the loss of a micro-batch, queries of users, recommendations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import can_return_tuple

from .base import GenRecPreTrainedModel
from .ops.full_softmax import full_softmax_loss
from .ops.sampled_softmax import sampled_softmax_loss
from .ops.sampled_softmax.naive import l2_normalize
from .outputs import RetrievalModelOutput, RetrievalOutput
from .packing import JaggedLayout, is_padded, keep_last, next_timestamps, pack_batch, unpack
from .retrieval import ShardedCatalogue

Embeddings = Mapping[str, Tensor]


class GenRecForRetrieval(GenRecPreTrainedModel):
    """A backbone `model` that predicts the next item: a loss in training, top-k over a catalogue in inference."""

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
        """The backbone's `forward` (its arguments too), and the loss when labels and negatives are given.

        Args:
            labels: int64, like `input_ids`: id of the event after each one; any value where it is masked.
            label_mask: bool, like `input_ids`: which tokens are trained; None: all.
            negative_ids: int64 [1, T, N] or [B, L, N] for negative_sampling "uniform", [N] for "shared", the ids of
                the whole catalogue [C] for "all".
            label_log_q: float32 like `input_ids`, negative_log_q: float32 [N]: log probabilities of being drawn;
                needed for "shared".
            embeddings: rows of a prepared step, see `embedding_ids`.
            num_items_in_batch: trained tokens of the whole step, over all micro-batches and ranks: what the sum is
                divided by. None: the trained tokens of this call.

        Raises:
            ValueError: for labels without negatives in training, for negatives of the other kind, and as
            the backbone's `forward`.
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
        # Before the backbone: which tokens are trained is a number that the host waits for.
        trained = self._trained(batch) if "labels" in batch and "negative_ids" in batch else None
        if embeddings is None:
            embeddings = self.embeddings(self.embedding_ids(batch))
        inputs = {name: batch.get(name) for name in _MODEL_FIELDS}
        output = self.model(**inputs, embeddings=embeddings, return_dict=True, **kwargs)
        hidden = output.last_hidden_state
        loss = None
        if trained is not None:
            loss = self._loss(batch, trained, hidden[0], embeddings, num_items_in_batch)
        query = self.score_vectors(hidden)
        if is_padded(fields):
            query = unpack(query, torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        return RetrievalModelOutput(loss=loss, query_embeddings=query, hidden_states=output.hidden_states)

    def _trained(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Labels [T'], negatives [T', N] or [N], and the places int64 [T'] of the trained tokens (None: all)."""
        labels, negatives = batch["labels"].flatten(), batch["negative_ids"]
        expected = 3 if self.config.negative_sampling == "uniform" else 1
        if negatives.dim() != expected:
            raise ValueError(
                f"negative_sampling is {self.config.negative_sampling!r}, so negative_ids must have {expected} "
                f"dimensions; got shape {tuple(negatives.shape)}. Sample as the config says, or change the config."
            )
        negatives = negatives[0] if expected == 3 else negatives
        if batch.get("label_mask") is None:
            return labels, negatives, None
        places = batch["label_mask"].flatten().nonzero().flatten()
        if len(places) == len(labels):
            return labels, negatives, None
        return labels[places], negatives[places] if expected == 3 else negatives, places

    def _loss(
        self,
        batch: Mapping[str, Any],
        trained: tuple[Tensor, Tensor, Tensor | None],
        hidden: Tensor,
        embeddings: Embeddings,
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor:
        labels, negatives, places = trained
        log_q = {}
        if self.config.negative_sampling == "shared":
            if "label_log_q" not in batch or "negative_log_q" not in batch:
                raise ValueError(
                    "Shared negatives need label_log_q [1, T] and negative_log_q [N]: let the collator draw them."
                )
            if batch["negative_log_q"].shape != negatives.shape:
                raise ValueError(
                    f"negative_log_q has shape {tuple(batch['negative_log_q'].shape)}, but negative_ids "
                    f"{tuple(negatives.shape)}: they must agree."
                )
            label_log_q = batch["label_log_q"].flatten()
            log_q["positive_log_q"] = label_log_q if places is None else label_log_q[places]
            log_q["negative_log_q"] = batch["negative_log_q"]
        rows, positive_index = embeddings.rows("labels")  # type: ignore[attr-defined]
        _, negative_index = embeddings.rows("negative_ids")  # type: ignore[attr-defined]
        query = hidden if places is None else hidden.index_select(0, places)
        if self.config.negative_sampling == "all":
            total = self._full_softmax(query, rows, positive_index, negative_index)
        else:
            accidental = negatives == labels.unsqueeze(1)
            total = self.sampled_loss(query, rows, positive_index, negative_index, accidental, **log_q)
        if num_items_in_batch is None:
            return total / max(1, labels.numel())
        # On a GPU it would have to be waited for.
        on_device = isinstance(num_items_in_batch, Tensor) and num_items_in_batch.device.type != "cpu"
        if not on_device and not num_items_in_batch >= 1:
            raise ValueError(
                f"num_items_in_batch must be at least 1, got {num_items_in_batch}: it is what the sum of the loss is "
                "divided by, the trained tokens of the whole step; give 1 for a step without any."
            )
        return total / num_items_in_batch

    def sampled_loss(
        self,
        query: Tensor,
        rows: Tensor,
        positive_index: Tensor,
        negative_index: Tensor,
        accidental: Tensor,
        **log_q: Tensor,
    ) -> Tensor:
        """Sum of the loss over the trained tokens, arguments as of `sampled_softmax_loss`; models override it."""
        return sampled_softmax_loss(
            query,
            rows,
            positive_index,
            negative_index,
            accidental,
            temperature=self.config.temperature,
            normalize=self.uses_cosine,
            **log_q,
        )

    def _full_softmax(self, query: Tensor, rows: Tensor, positive_index: Tensor, item_index: Tensor) -> Tensor:
        """Sum over the trained tokens of the softmax loss over the items of the catalogue, rows[item_index]."""
        place = torch.full((len(rows),), -1, device=item_index.device)
        place[item_index] = torch.arange(len(item_index), device=item_index.device)
        target = place[positive_index]
        twice = (place >= 0).sum() < len(item_index)
        if bool(twice | (target < 0).any()):
            raise ValueError(
                "negative_ids hold an item twice, which would count twice in the softmax: give each item of the "
                "catalogue once."
                if bool(twice)
                else "A label is not among negative_ids, which for negative_sampling='all' must be the whole "
                "catalogue: let the collator give them, or prepare the data again."
            )
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        items = self.score_vectors(F.embedding(item_index, rows.to(wide)))
        return full_softmax_loss(self.score_vectors(query.to(wide)) / self.config.temperature, items, target)

    @property
    def uses_cosine(self) -> bool:
        """Whether the score of an item is a cosine; otherwise it is the inner product with its row."""
        return True

    def score_vectors(self, vectors: Tensor) -> Tensor:
        """[..., D] -> [..., D]: queries or items such that their inner product is the score."""
        return l2_normalize(vectors) if self.uses_cosine else vectors

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        timestamps: Tensor | None = None,
        target_timestamps: Tensor | None = None,
        request_timestamps: Tensor | None = None,
        embeddings: Embeddings | None = None,
        **others: Any,
    ) -> Tensor:
        """Query vectors of users: the output at the last event of each history.

        Arguments as in the backbone's `forward`, and:
            request_timestamps: int64 [B] seconds, when each user asks. None: `target_timestamps` if given, else the
                time of the last event. Not before the last event.
            others: further fields of a collator's micro-batch, such as labels; they are not looked at.

        Without `embeddings`, histories are cut to their last `max_sequence_length` events, and their `position_ids` go
        down by as many as were cut off. Nothing is inserted, nothing
        dropped out, whatever the mode; ids without a row get what `unknown_items` says. Collective when the tables
        are sharded.

        Returns:
            float32 [B, D].

        Raises:
            ValueError: for an empty history, for a field that no micro-batch has, and as the backbone's `forward`.
        """
        _check_names("encode", others)
        batch = pack_batch(
            dict(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
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
            inputs = {name: batch.get(name) for name in _MODEL_FIELDS}
            hidden = self.model(**inputs, embeddings=embeddings, return_dict=True).last_hidden_state
            return self.score_vectors(hidden[0].index_select(0, layout.cu_seq_lens[1:] - 1).float())

    def item_embeddings(self, ids: Tensor) -> Tensor:
        """Vectors that items are scored by, read only: int64 [n] -> float32 [n, D]. Collective with sharded tables.

        The ids may be anywhere; the vectors are where the model is, since that is where they meet the users'.
        """
        with self.inference():
            step = self.embeddings.prepare([{"candidate_ids": ids}], insert=False).fetch(self.device)
            return self.score_vectors(step[0]["candidate_ids"])

    def recommend(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        top_k: int = 10,
        candidates: Tensor | Sequence[int] | ShardedCatalogue | None = None,
        exclude_seen: bool = True,
        **history: Any,
    ) -> RetrievalOutput:
        """The k best items for each user, by score of query and item, ties to the smaller id.

        Args:
            input_ids, attention_mask, history: as in `encode` (`timestamps`, `request_timestamps`, `cu_seq_lens_q`,
                ...).
            candidates: int64 item ids; None: all rows of the table. Who asks often builds a `ShardedCatalogue` once
                and passes it.
            exclude_seen: leave out the items of the history, all of it.

        Raises:
            ValueError: when there are fewer than `top_k` candidates, for items whose vectors are not finite, and as
                `encode`.
        """
        _check_names("recommend", history)
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
# What else the collators put into a micro-batch: allowed, so that one can be passed as it is.
_OTHER_FIELDS = {
    "token_keys",
    "labels",
    "label_mask",
    "negative_ids",
    "label_log_q",
    "negative_log_q",
    "user_ids",
    "seen_item_ids",
    "cu_seen",
    "label_index",
}
_MODEL_FIELDS = ("input_ids", "position_ids", "cu_seq_lens_q", "timestamps", "target_timestamps", "token_keys")


def _check_names(function: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError for a field that no micro-batch has: a misspelt one would be ignored without a word."""
    if unknown := sorted(set(given) - _HISTORY_FIELDS - _OTHER_FIELDS):
        raise ValueError(
            f"{function}() does not take {unknown}; a history has {sorted(_HISTORY_FIELDS)} beside input_ids and "
            "attention_mask."
        )
