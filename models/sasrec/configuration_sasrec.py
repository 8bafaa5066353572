"""Configuration of SASRec."""

from typing import Any, Literal

import numpy as np
from grzoo.embeddings import FeatureConfig, TableConfig
from grzoo.models.item_table import item_features, item_tables
from huggingface_hub.dataclasses import strict
from numpy.typing import NDArray
from transformers import PreTrainedConfig

_POSITIVE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_sequence_length",
    "num_negatives",
    "temperature",
    "initializer_range",
    "layer_norm_eps",
)


@strict
class SASRecConfig(PreTrainedConfig):
    r"""Hyperparameters of SASRec; the defaults are those of the paper (arXiv 1808.09781) for MovieLens-1M.

    Args:
        hidden_size: D, width of the items and of the residual stream.
        intermediate_size: width of the feed-forward layer; None: D.
        num_hidden_layers: blocks.
        num_attention_heads: H; D is a multiple of it.
        layer_norm: "original": before attention and feed-forward, queries and residual are normalised, keys and values
            are not (the authors' code); "pre": before, the residual is not normalised; "post": after, as in BERT,
            and on the input instead of the output; "post_final": after, and on the output as for "pre".
        hidden_act: of the feed-forward layer, "relu" or "gelu".
        scale_items: multiply item vectors by sqrt(D) at the input.
        max_sequence_length: events of a history that are kept, the last ones; also the number of positions.
        position_alignment: "end": the last event always has the last position, as in a history padded at its start;
            "start": the first has position 0.
        hidden_dropout: dropout of the input, of the attention's output and of both feed-forward products.
        loss: "bce", "gbce" (BCE whose positive is weighted against the sampling of negatives) or "softmax".
        gbce_calibration: t of gBCE in [0, 1]; 0 is BCE, 1 calibrates fully.
        num_items: size of the catalogue, needed by "gbce" alone.
        similarity: score of an item: its inner product with the query, "dot", or their "cosine".
        temperature: scores are divided by it in the loss.
        negative_sampling: "uniform": own negatives for each token, from all items; "shared" (softmax only): one set for
            the whole step, drawn from its positives and corrected by the logarithm of their probability; "all" (softmax
            only): the whole catalogue.
        num_negatives: N, per token, per step, or items of the catalogue.
        item_initializer: how new item vectors are drawn, see `grzoo.embeddings.TableConfig`.
        unknown_items: vector of an item that the table does not hold, when reading: "zeros" or "initial".
        table_policies: admission, eviction, max_rows, track_use and placement of a table, by its name, "items"; see
            TableConfig.
        embedding_seed: seed of the initial item vectors.
        initializer_range: std of dense weights and positions.
        layer_norm_eps: of all normalisations.

    Example:
        >>> from grzoo.models import SASRecConfig, SASRecForRetrieval
        >>> model = SASRecForRetrieval(SASRecConfig(hidden_size=16))
    """

    model_type = "sasrec"

    hidden_size: int = 50
    intermediate_size: int | None = None
    num_hidden_layers: int = 2
    num_attention_heads: int = 1
    layer_norm: Literal["original", "pre", "post", "post_final"] = "original"
    hidden_act: Literal["relu", "gelu"] = "relu"
    scale_items: bool = True
    max_sequence_length: int = 200
    position_alignment: Literal["start", "end"] = "end"
    hidden_dropout: float | int = 0.2
    loss: Literal["bce", "gbce", "softmax"] = "bce"
    gbce_calibration: float | int = 0.75
    num_items: int | None = None
    similarity: Literal["dot", "cosine"] = "dot"
    temperature: float | int = 1.0
    negative_sampling: Literal["uniform", "shared", "all"] = "uniform"
    num_negatives: int = 1
    item_initializer: dict[str, Any] | None = None
    unknown_items: Literal["zeros", "initial"] = "zeros"
    table_policies: dict[str, dict[str, Any]] | None = None
    embedding_seed: int = 0
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-8

    def __post_init__(self, **kwargs: Any) -> None:
        if self.item_initializer is None:
            self.item_initializer = {"kind": "truncated_normal", "std": 0.02}
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raises ValueError for values that no model can be built of."""
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"SASRecConfig: {name} must be positive; got {getattr(self, name)}.")
        if self.intermediate_size is not None and self.intermediate_size <= 0:
            raise ValueError(f"SASRecConfig: intermediate_size must be positive; got {self.intermediate_size}.")
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"SASRecConfig: hidden_dropout must lie in [0, 1); got {self.hidden_dropout}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"SASRecConfig: hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        self._validate_loss()
        self.embedding_tables()

    def _validate_loss(self) -> None:
        if self.loss != "softmax" and self.negative_sampling != "uniform":
            raise ValueError(
                f"SASRecConfig: loss {self.loss!r} takes negative_sampling 'uniform' alone; got "
                f"{self.negative_sampling!r}. Use loss='softmax' with it."
            )
        if not 0 <= self.gbce_calibration <= 1:
            raise ValueError(f"SASRecConfig: gbce_calibration must lie in [0, 1]; got {self.gbce_calibration}.")
        if self.loss == "gbce" and (self.num_items is None or self.num_items <= self.num_negatives):
            raise ValueError(
                f"SASRecConfig: loss 'gbce' needs num_items, more than num_negatives ({self.num_negatives}); got "
                f"{self.num_items}. Give the number of items of the catalogue."
            )

    @property
    def positive_power(self) -> float:
        """beta of gBCE: `a (t (1 - 1/a) + 1/a)` with `a = N / (num_items - 1)`; 1 for the other losses."""
        if self.loss != "gbce":
            return 1.0
        assert self.num_items is not None
        rate = self.num_negatives / (self.num_items - 1)
        return rate * (self.gbce_calibration * (1 - 1 / rate) + 1 / rate)

    def embedding_tables(self) -> list[TableConfig]:
        """The dynamic tables of the model."""
        return item_tables(self)

    def embedding_features(self) -> list[FeatureConfig]:
        """Which field of a micro-batch looks up which table."""
        return item_features()

    def flops(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Floating-point operations of a training forward pass per sample; the cost that balancing evens out.

        With L events and F = intermediate_size, per layer: four projections `8 L D^2`, causal attention
        `2 L (L + 1) D`, feed-forward `4 L D F`; once: logits `2 L D (1 + N)`. A multiplication and an addition count
        as two.

        Args:
            lengths: int [n], events per sample after truncation.

        Returns:
            float64 [n].
        """
        events = np.asarray(lengths, dtype=np.float64)
        width, inner = self.hidden_size, self.intermediate_size or self.hidden_size
        per_layer = events * (8 * width**2 + 4 * width * inner) + 2 * events * (events + 1) * width
        return self.num_hidden_layers * per_layer + 2 * events * width * (1 + self.num_negatives)


__all__ = ["SASRecConfig"]
