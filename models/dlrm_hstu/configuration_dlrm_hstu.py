"""Configuration of DLRM-HSTU."""

from typing import Any

import numpy as np
from grzoo.models.ranking import RankingConfig
from huggingface_hub.dataclasses import strict
from numpy.typing import NDArray


@strict
class DLRMHSTUConfig(RankingConfig):
    r"""Hyperparameters of DLRM-HSTU; features and tasks as in `RankingConfig`.

    Args:
        num_hidden_layers: STU layers.
        num_attention_heads: H.
        attention_head_dim: width of a head's query and key (`attention_dim`).
        linear_head_dim: width of a head's value and gate (`hidden_dim`).
        max_position_embeddings: the length that attention divides by, and places of the positional encoder; above
            `max_sequence_length`, since a candidate stands after its history.
        num_time_buckets: entries of the encoder's time table.
        time_bucket_seconds: unit of the square root that gives the bucket.
        max_attn_len: a token sees at most this many events before it; None: all.
    """

    model_type = "dlrm_hstu"
    attribute_map = {"attention_dim": "attention_head_dim", "hidden_dim": "linear_head_dim"}

    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    attention_head_dim: int = 32
    linear_head_dim: int = 32
    max_position_embeddings: int = 256
    num_time_buckets: int = 2048
    time_bucket_seconds: int = 60
    max_attn_len: int | None = None

    def positive_fields(self) -> tuple[str, ...]:
        return (
            *super().positive_fields(),
            "num_hidden_layers",
            "num_attention_heads",
            "attention_head_dim",
            "linear_head_dim",
            "max_position_embeddings",
            "num_time_buckets",
            "time_bucket_seconds",
        )

    def validate_architecture(self) -> None:
        """Raises ValueError for values that no model can be built of."""
        super().validate_architecture()
        if self.max_position_embeddings <= self.max_sequence_length:
            raise ValueError(
                f"DLRMHSTUConfig: max_position_embeddings ({self.max_position_embeddings}) must be above "
                f"max_sequence_length ({self.max_sequence_length}): a candidate stands after its history."
            )
        if self.max_attn_len is not None and self.max_attn_len < 1:
            raise ValueError(f"DLRMHSTUConfig: max_attn_len must be at least 1 or None; got {self.max_attn_len}.")

    def flops(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Floating-point operations of the layers' forward pass per sample, attention over all pairs before a token.

        Args:
            lengths: int [n], tokens per sample: profile, history and candidates.

        Returns:
            float64 [n].
        """
        tokens, width, heads = np.asarray(lengths, dtype=np.float64), self.hidden_size, self.num_attention_heads
        dqk, dv = self.attention_head_dim, self.linear_head_dim
        per_token = 2 * width * heads * (2 * dv + 2 * dqk) + 2 * 3 * heads * dv * width
        return self.num_hidden_layers * (tokens * per_token + tokens * (tokens + 1) * heads * (dqk + dv))


__all__ = ["DLRMHSTUConfig"]
