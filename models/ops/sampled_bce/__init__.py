"""Binary cross-entropy of one positive and sampled negatives: BCE and gBCE."""

from .loss import sampled_bce_loss
from .naive import sampled_bce_loss_naive

__all__ = ["sampled_bce_loss", "sampled_bce_loss_naive"]
