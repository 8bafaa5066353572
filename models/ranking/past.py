"""How many events of a user's history precede each candidate."""

import torch
from torch import Tensor

from .batch import RankingBatch


def candidate_owners(batch: RankingBatch) -> Tensor:
    """int64 [C]: number of the user of each candidate."""
    counts = batch.candidates.cu_seq_lens.diff()
    users = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(users, counts, output_size=batch.candidates.num_tokens)


def events_before(batch: RankingBatch) -> Tensor:
    """int64 [C]: events of the user's history with a strictly earlier time than the candidate."""
    times, owner = batch.timestamps, candidate_owners(batch)
    low, high = batch.layout.cu_seq_lens[owner], batch.layout.cu_seq_lens[owner + 1]
    first = low
    # A binary search in each candidate's own history, all of them at once.
    for _ in range(max(1, batch.layout.max_length).bit_length()):
        middle = (low + high) // 2
        inside = low < high
        time = times[middle.clamp(max=max(0, len(times) - 1))] if len(times) else middle
        earlier = inside & (time < batch.candidate_timestamps)
        low = torch.where(earlier, middle + 1, low)
        high = torch.where(inside & ~earlier, middle, high)
    return low - first
