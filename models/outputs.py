"""What the models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class GenRecModelOutput(ModelOutput):
    """Output of a backbone.

    Attributes:
        last_hidden_state: [1, T, D] for packed input, [B, L, D] for padded input (zero at padding).
        hidden_states: with `output_hidden_states=True`, the input of each layer, packed, [T, D], and at the end
            `last_hidden_state` in its own shape.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class RetrievalModelOutput(ModelOutput):
    """Output of a model for retrieval.

    Attributes:
        loss: scalar, with labels and negatives: sum over trained tokens / `num_items_in_batch` (without it: mean).
        query_embeddings: [1, T, D] or [B, L, D]: entry t is the query for the event after t, L2-normalised where the
            score is a cosine.
        hidden_states: see `GenRecModelOutput`.
    """

    loss: Tensor | None = None
    query_embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class RetrievalOutput(ModelOutput):
    """Recommended items, best first.

    Attributes:
        item_ids: int64 [B, k]. Any int64 can be an id: it is the score that says whether there is an item.
        scores: float32 [B, k], cosine or inner product of query and item, as the model scores; -inf (with item id -1)
            where fewer than k candidates are left.
    """

    item_ids: Tensor | None = None
    scores: Tensor | None = None


@dataclass
class RankingModelOutput(ModelOutput):
    """Output of a model for ranking.

    Attributes:
        loss: scalar, with labels: the sum over the tasks of binary cross-entropy / `num_items_in_batch`.
        logits: float32 [1, C, tasks] for packed candidates, [B, K, tasks] for padded ones (zero at padding).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
