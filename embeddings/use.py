"""When and how often rows are used: two int32 of each row, kept bit for bit in float32 slots of its storage."""

import torch
from torch import Tensor

from .kernels import Slot, TableStorage

LAST_USE = "last_use"  # number of the optimizer step that used the row last
COUNT = "count"  # occurrences of its id so far; halved every half_life steps where frequency decays
USE_SLOTS = (Slot(LAST_USE, 1), Slot(COUNT, 1))

_MAX = 2**31 - 1


def as_slot(values: Tensor) -> Tensor:
    """Return the slot float32 [n, 1] that holds values int32 or int64 [n]."""
    return values.to(torch.int32).view(torch.float32).reshape(-1, 1)


def read_slot(storage: TableStorage, name: str, handles: Tensor) -> Tensor:
    """Return LAST_USE or COUNT of rows, int32 [n]."""
    return storage.gather_slot(name, handles).reshape(-1).view(torch.int32)


def record_use(
    storage: TableStorage, handles: Tensor, occurrences: Tensor, now: int, half_lives: Tensor | None
) -> None:
    """Note that step `now` uses rows: handles int64 [n] distinct, occurrences int64 [n].

    half_lives int64 [n] or one number halves the count once for each multiple of it that was passed (0: never).
    """
    counts = read_slot(storage, COUNT, handles).long()
    if half_lives is not None:
        counts = decayed(counts, read_slot(storage, LAST_USE, handles).long(), now, half_lives)
    counts = (counts + occurrences).clamp_(max=_MAX)
    last_use = torch.full_like(counts, now)
    storage.scatter(handles, None, {LAST_USE: as_slot(last_use), COUNT: as_slot(counts)})


def decayed(counts: Tensor, last_use: Tensor, now: int, half_lives: Tensor) -> Tensor:
    """Return counts int64 [n] as of step `now`: halved, rounding down, at every step that is a multiple of a half-life.

    Nothing is halved where half_lives (int64, [n] or scalar) is 0.
    """
    period = half_lives.clamp(min=1)
    halvings = (now // period - last_use // period).clamp_(0, 31) * (half_lives > 0)
    return counts >> halvings
