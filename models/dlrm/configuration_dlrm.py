"""Configuration of the DLRM-style baseline."""

from typing import Any

import numpy as np
from grzoo.models.ranking import RankingConfig
from huggingface_hub.dataclasses import strict
from numpy.typing import NDArray


@strict
class DLRMConfig(RankingConfig):
    r"""Hyperparameters of the baseline; features and tasks as in `RankingConfig`.

    Args:
        mlp_size: width of the hidden layers over the products.
        num_mlp_layers: their number.

    Example:
        >>> from grzoo.models import DLRMConfig, DLRMForRanking
        >>> model = DLRMForRanking(DLRMConfig(user_features=["age"], cross_features=["clicks"]))
    """

    model_type = "dlrm"

    mlp_size: int = 128
    num_mlp_layers: int = 2

    def positive_fields(self) -> tuple[str, ...]:
        return (*super().positive_fields(), "mlp_size", "num_mlp_layers")

    @property
    def num_vectors(self) -> int:
        """Vectors that are multiplied with each other: profile features, mean of the history, candidate."""
        return len(self.user_features or []) + 2

    @property
    def interaction_size(self) -> int:
        """Width of the vectors and their products beside each other."""
        return self.num_vectors * self.hidden_size + self.num_vectors * (self.num_vectors - 1) // 2

    def flops(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Floating-point operations of a forward pass per sample, as if every token were a candidate.

        Args:
            lengths: int [n], tokens per sample: profile, history and candidates.

        Returns:
            float64 [n].
        """
        tokens, vectors = np.asarray(lengths, dtype=np.float64), self.num_vectors
        products = vectors * (vectors - 1) * self.hidden_size
        layers = 2 * self.mlp_size * (self.interaction_size + (self.num_mlp_layers - 1) * self.mlp_size)
        return tokens * (4 * self.hidden_size**2 + products + layers)


__all__ = ["DLRMConfig"]
