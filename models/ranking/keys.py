"""Dropout keys of the tokens of a ranking batch."""

import torch
from grzoo.embeddings.keyed import fold
from torch import Tensor

from .batch import RankingBatch


@torch.compiler.disable  # inductor's 64-bit products are other ones
def dropout_keys(batch: RankingBatch, num_user_tokens: int) -> Tensor | None:
    """int64 [B P + T + C]: keys of profile tokens, events and candidates; None where the batch holds none."""
    if batch.token_keys is None or batch.candidate_keys is None or batch.user_keys is None:
        return None
    profile = fold(batch.user_keys.unsqueeze(1), torch.arange(num_user_tokens, device=batch.user_keys.device))
    assert isinstance(profile, Tensor)
    return torch.cat([profile.flatten(), batch.token_keys, batch.candidate_keys])
