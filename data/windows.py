"""Which part of a history becomes a sample: rows of a split -> samples of at most `max_length` inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from .dataset import EventDataset
from .jagged import Int64, ranges
from .keyed import SITE_LENGTH, fold, keyed, uniform


@dataclass(frozen=True)
class Samples:
    """Samples of a split: events begin <= i < end of `rows`; those from `target_from` on are targets. All int64 [n].

    A sample of k events gives k - 1 inputs (all but the last) with as many labels (all but the first).
    """

    rows: Int64
    begin: Int64
    end: Int64
    target_from: Int64

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: ArrayLike | slice) -> "Samples":
        at = index if isinstance(index, slice) else np.asarray(index)
        return Samples(self.rows[at], self.begin[at], self.end[at], self.target_from[at])

    @property
    def num_inputs(self) -> Int64:
        """Tokens of each sample, int64 [n]."""
        return np.maximum(self.end - self.begin - 1, 0)

    @property
    def first_label(self) -> Int64:
        """Index in the row of the first event that is predicted, int64 [n]: it has at least one event before it."""
        return np.maximum(self.target_from, self.begin + 1)

    @property
    def num_labels(self) -> Int64:
        """Predicted events of each sample, int64 [n]."""
        return np.maximum(self.end - self.first_label, 0)


class Windows(Protocol):
    """A policy that cuts the rows of a split into samples."""

    dataset: EventDataset
    max_length: int

    def __len__(self) -> int:
        """Samples of the split."""

    def select(self, indices: ArrayLike, epoch: int = 0) -> Samples:
        """The samples `indices` (int [n]) of an epoch."""


WindowPolicy = Callable[[EventDataset, int], Windows]


def _check(max_length: int) -> int:
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1 event, got {max_length}")
    return max_length


class RecentFirst:
    """One sample per row: its last `max_length + 1` events, that is `max_length` inputs and the label of the last one.

    Older events are not read, and targets among them are not trained: an event is trained once per epoch, or never.
    """

    def __init__(self, dataset: EventDataset, max_length: int) -> None:
        self.dataset, self.max_length = dataset, _check(max_length)

    def __len__(self) -> int:
        return len(self.dataset)

    def select(self, indices: ArrayLike, epoch: int = 0) -> Samples:
        rows = np.asarray(indices, dtype=np.int64)
        end = self.dataset.lengths[rows].astype(np.int64)
        begin = np.maximum(end - self.max_length - 1, 0)
        return Samples(rows, begin, end, self.dataset.target_from[rows].astype(np.int64))


class StochasticLength(RecentFirst):
    """One sample per row, of a random length: HSTU's stochastic length (Zhai et al. 2024, section 3.2).

    A history of n inputs beyond `max_length ** (alpha / 2)` is cut to that many, but with probability
    `max_length ** alpha / n ** 2` it stays (n: after the cut to `max_length`). What is kept is the most recent part,
    not a drawn subsequence, so that every label still follows its own predecessor; labels before it are not trained in
    this epoch. The draw is keyed by (seed, epoch, row).
    """

    def __init__(self, dataset: EventDataset, max_length: int, alpha: float = 1.6, seed: int = 0) -> None:
        super().__init__(dataset, max_length)
        if not 1 < alpha <= 2:
            raise ValueError(f"alpha of stochastic length lies above 1 and up to 2 (2 cuts nothing), got {alpha}")
        self.alpha, self.seed = alpha, seed
        self.short = max(1, round(max_length ** (alpha / 2)))

    def select(self, indices: ArrayLike, epoch: int = 0) -> Samples:
        samples = super().select(indices, epoch)
        inputs = np.maximum(samples.num_inputs, 1)
        drawn = uniform(fold(keyed(self.seed, SITE_LENGTH, epoch), samples.rows))
        cut = (inputs > self.short) & (drawn >= self.max_length**self.alpha / inputs.astype(np.float64) ** 2)
        begin = np.where(cut, samples.end - self.short - 1, samples.begin)
        return Samples(samples.rows, begin, samples.end, samples.target_from)


class SlidingWindows:
    """Samples that hold every target of a row exactly once: one where the row fits in it, else several windows.

    overlap: the share of `max_length` that a window has in common with the one before it, in [0, 1). These events are
    context: what a window trains begins where the window before it ends, so that an event is trained once per epoch
    and has at least that many events before it, or all there are. Rows without a target that has context give no
    sample. Holds 8 bytes per row.
    """

    def __init__(self, dataset: EventDataset, max_length: int, overlap: float = 0.5) -> None:
        self.dataset, self.max_length = dataset, _check(max_length)
        if not 0 <= overlap < 1:
            raise ValueError(f"the overlap of sliding windows is a share from 0 to below 1, got {overlap}")
        self.stride = max(1, max_length - int(overlap * max_length + 0.5))
        end, first = self._targets(slice(None))
        targets = end - first
        counts = np.where(targets <= 0, 0, -(-np.maximum(targets, 1) // self.stride))
        counts[(counts > 1) & (end <= max_length + 1)] = 1
        self._ends = np.cumsum(counts)

    def _targets(self, rows: Int64 | slice) -> tuple[Int64, Int64]:
        """End of each row, and its first target that has context."""
        end = self.dataset.lengths[rows].astype(np.int64)
        return end, np.maximum(self.dataset.target_from[rows].astype(np.int64), 1)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def select(self, indices: ArrayLike, epoch: int = 0) -> Samples:
        number = np.asarray(indices, dtype=np.int64)
        rows = np.searchsorted(self._ends, number, side="right")
        end, first = self._targets(rows)
        before = np.where(rows > 0, self._ends[rows - 1], 0)
        sample_end = end - (self._ends[rows] - 1 - number) * self.stride
        target_from = np.where(number == before, first, sample_end - self.stride)
        return Samples(rows, np.maximum(sample_end - self.max_length - 1, 0), sample_end, target_from)


class EveryTarget(SlidingWindows):
    """Sliding windows with half a window of overlap: how evaluation splits are cut."""

    def __init__(self, dataset: EventDataset, max_length: int) -> None:
        super().__init__(dataset, max_length, overlap=0.5)


def trained_positions(samples: Samples) -> tuple[Int64, Int64]:
    """(sample, event index in its row) of every predicted event, each int64 [sum of num_labels], in sample order."""
    counts = samples.num_labels
    return np.repeat(np.arange(len(samples), dtype=np.int64), counts), ranges(samples.first_label, counts)
