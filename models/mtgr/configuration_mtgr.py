"""Configuration of MTGR."""

from typing import Any

import numpy as np
from grzoo.models.ranking import RankingConfig
from huggingface_hub.dataclasses import strict
from numpy.typing import NDArray


@strict
class MTGRConfig(RankingConfig):
    r"""Hyperparameters of MTGR; features and tasks as in `RankingConfig`. `MTGRConfig.small()`, `.medium()` and
    `.large()` have the sizes of the paper.

    Args:
        num_hidden_layers: blocks.
        num_attention_heads: H; a head is `hidden_size / H` wide.
        use_group_norm: separate normalisation parameters for profile, long-term, real-time and candidate tokens.
        use_dynamic_mask: real-time events are seen by what is later. Without it, a sample's real-time events before its
            first candidate count as long-term ones and no token sees the others: what a mask that knows no time of a
            candidate can show without showing its future. The events since the first candidate are lost with it.

    Example:
        >>> from grzoo.models import MTGRConfig, MTGRForRanking
        >>> model = MTGRForRanking(MTGRConfig.small(tasks=["click", "order"], cross_features=["user_item_clicks"]))
    """

    model_type = "mtgr"

    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    use_group_norm: bool = True
    use_dynamic_mask: bool = True

    @classmethod
    def small(cls, **fields: Any) -> "MTGRConfig":
        """3 blocks, width 512, 2 heads: 5.47 GFLOPs at 500 tokens."""
        return cls(**{"hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2, **fields})

    @classmethod
    def medium(cls, **fields: Any) -> "MTGRConfig":
        """5 blocks, width 768, 3 heads: 18.59 GFLOPs at 500 tokens."""
        return cls(**{"hidden_size": 768, "num_hidden_layers": 5, "num_attention_heads": 3, **fields})

    @classmethod
    def large(cls, **fields: Any) -> "MTGRConfig":
        """15 blocks, width 768, 3 heads: 55.76 GFLOPs at 500 tokens."""
        return cls(**{"hidden_size": 768, "num_hidden_layers": 15, "num_attention_heads": 3, **fields})

    def positive_fields(self) -> tuple[str, ...]:
        return (*super().positive_fields(), "num_hidden_layers", "num_attention_heads")

    def validate_architecture(self) -> None:
        """Raises ValueError for values that no model can be built of."""
        super().validate_architecture()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"MTGRConfig: hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )

    def flops(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Floating-point operations of the blocks' forward pass per sample: `layers (10 L D^2 + 4 L^2 D)`.

        Five D x D projections per layer, scores and weighted sum over all pairs; feature networks and heads are left
        out, as in the published numbers.

        Args:
            lengths: int [n], tokens per sample: profile, history and candidates.

        Returns:
            float64 [n].
        """
        tokens, width = np.asarray(lengths, dtype=np.float64), self.hidden_size
        return self.num_hidden_layers * (10 * tokens * width**2 + 4 * tokens**2 * width)


__all__ = ["MTGRConfig"]
