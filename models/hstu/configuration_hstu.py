"""Configuration of HSTU."""

from typing import Any, Literal

import numpy as np
from grzoo.embeddings import FeatureConfig, TableConfig
from grzoo.models.item_table import item_features, item_tables
from grzoo.models.ops.hstu_attention.bias import MAX_BUCKETS
from huggingface_hub.dataclasses import strict
from numpy.typing import NDArray
from transformers import PreTrainedConfig


@strict
class HSTUConfig(PreTrainedConfig):
    r"""Hyperparameters of the retrieval form of HSTU; the defaults are those of the paper for MovieLens-1M.

    Args:
        hidden_size: D, width of the items and of the residual stream (paper name `embedding_dim`).
        num_hidden_layers: blocks (`num_blocks`).
        num_attention_heads: H (`num_heads`).
        attention_head_dim: width of a head's query and key (`dqk`).
        linear_head_dim: width of a head's value and gate (`dv`).
        max_sequence_length: events of a history that are kept, the last ones.
        max_position_embeddings: n, at least `max_sequence_length`: attention divides by it, and it sizes the position
            tables. The paper has `max_sequence_length` + 11.
        hidden_dropout: dropout of the input and of each block's output projection (`dropout_rate`).
        use_time_bias: whether attention has a bias by time difference; timestamps are needed then.
        num_time_buckets: entries of its table, at most 160.
        temperature: of the sampled softmax.
        negative_sampling: "uniform": own negatives for each token, from all items; "shared": one set for the whole
            step, drawn from its positives and corrected by the logarithm of their probability; "all": the whole
            catalogue (full softmax).
        num_negatives: N, per token, per step, or items of the catalogue.
        item_initializer: how new item vectors are drawn, see `grzoo.embeddings.TableConfig`.
        unknown_items: vector of an item that the table does not hold, when reading: "zeros" or "initial".
        table_policies: admission, eviction, max_rows, track_use and placement of a table, by its name, "items"; see
            TableConfig.
        embedding_seed: seed of the initial item vectors.
        initializer_range: std of the dense weights and bias tables.
        layer_norm_eps: of both normalisations of a block.

    Example:
        >>> from grzoo.models import HSTUConfig, HSTUForRetrieval
        >>> model = HSTUForRetrieval(HSTUConfig(hidden_size=16, attention_head_dim=16, linear_head_dim=16))
    """

    model_type = "hstu"
    attribute_map = {
        "embedding_dim": "hidden_size",
        "num_blocks": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "dqk": "attention_head_dim",
        "dv": "linear_head_dim",
        "dropout_rate": "hidden_dropout",
    }

    hidden_size: int = 50
    num_hidden_layers: int = 2
    num_attention_heads: int = 1
    attention_head_dim: int = 50
    linear_head_dim: int = 50
    max_sequence_length: int = 200
    max_position_embeddings: int = 211
    hidden_dropout: float | int = 0.2
    use_time_bias: bool = True
    num_time_buckets: int = 129
    temperature: float | int = 0.05
    negative_sampling: Literal["uniform", "shared", "all"] = "uniform"
    num_negatives: int = 128
    item_initializer: dict[str, Any] | None = None
    unknown_items: Literal["zeros", "initial"] = "zeros"
    table_policies: dict[str, dict[str, Any]] | None = None
    embedding_seed: int = 0
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        if self.item_initializer is None:
            self.item_initializer = {"kind": "truncated_normal", "std": 0.02}
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raises ValueError for values that no model can be built of."""
        positive = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "attention_head_dim",
            "linear_head_dim",
            "max_sequence_length",
            "max_position_embeddings",
            "num_time_buckets",
            "num_negatives",
            "temperature",
            "initializer_range",
            "layer_norm_eps",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"HSTUConfig: {name} must be positive; got {getattr(self, name)}.")
        if self.num_time_buckets > MAX_BUCKETS:
            raise ValueError(
                f"HSTUConfig: num_time_buckets must be at most {MAX_BUCKETS}; got {self.num_time_buckets}. Differences "
                "of 64-bit times reach 146 buckets: more are never used."
            )
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"HSTUConfig: hidden_dropout must lie in [0, 1); got {self.hidden_dropout}.")
        if self.max_position_embeddings < self.max_sequence_length:
            raise ValueError(
                f"HSTUConfig: max_position_embeddings ({self.max_position_embeddings}) is smaller than "
                f"max_sequence_length ({self.max_sequence_length}); make it as large (the paper: 11 more)."
            )
        self.embedding_tables()

    def embedding_tables(self) -> list[TableConfig]:
        """The dynamic tables of the model."""
        return item_tables(self)

    def embedding_features(self) -> list[FeatureConfig]:
        """Which field of a micro-batch looks up which table."""
        return item_features()

    def flops(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Floating-point operations of a training forward pass per sample; the cost that balancing evens out.

        With L events, per layer: projections `2 L D H (2 dv + 2 dqk)`, causal attention `L (L + 1) H (dqk + dv)`,
        output `2 L H dv D`; once: logits `2 L D (1 + N)`. A multiplication and an addition count as two.

        Args:
            lengths: int [n], events per sample after truncation.

        Returns:
            float64 [n].
        """
        events = np.asarray(lengths, dtype=np.float64)
        width, heads, dqk, dv = (
            self.hidden_size,
            self.num_attention_heads,
            self.attention_head_dim,
            self.linear_head_dim,
        )
        per_event = 2 * width * heads * (2 * dv + 2 * dqk) + 2 * heads * dv * width
        attention = events * (events + 1) * heads * (dqk + dv)
        logits = 2 * events * width * (1 + self.num_negatives)
        return self.num_hidden_layers * (events * per_event + attention) + logits


__all__ = ["HSTUConfig"]
