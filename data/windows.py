"""Which part of a history becomes a sample: rows of a split -> samples of at most `max_length` inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from .dataset import EventDataset
from .jagged import Int64, ranges, within


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

    def select(self, indices: ArrayLike) -> Samples:
        """The samples `indices` (int [n])."""


WindowPolicy = Callable[[EventDataset, int], Windows]


def _check(max_length: int) -> int:
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1 event, got {max_length}")
    return max_length


class RecentFirst:
    """One sample per row: its last `max_length + 1` events, that is `max_length` inputs and the label of the last one.

    Older events are not read, and targets among them are not trained.
    """

    def __init__(self, dataset: EventDataset, max_length: int) -> None:
        self.dataset, self.max_length = dataset, _check(max_length)

    def __len__(self) -> int:
        return len(self.dataset)

    def select(self, indices: ArrayLike) -> Samples:
        rows = np.asarray(indices, dtype=np.int64)
        end = self.dataset.lengths[rows].astype(np.int64)
        begin = np.maximum(end - self.max_length - 1, 0)
        return Samples(rows, begin, end, self.dataset.target_from[rows].astype(np.int64))


class EveryTarget:
    """Samples that hold every target of a row once: one where the row fits in it, else several windows.

    Windows of one row advance by half of `max_length`, so that every target sees that many events before it, or all
    there are. Rows without a target that has context give no sample.
    """

    def __init__(self, dataset: EventDataset, max_length: int) -> None:
        self.dataset, self.max_length = dataset, _check(max_length)
        end = dataset.lengths.astype(np.int64)
        first = np.maximum(dataset.target_from.astype(np.int64), 1)
        self._stride = max(1, max_length // 2)
        targets = end - first
        counts = np.where(targets <= 0, 0, -(-np.maximum(targets, 1) // self._stride))
        whole = (counts > 1) & (end <= max_length + 1)
        counts[whole] = 1
        rows = np.repeat(np.arange(len(end), dtype=np.int64), counts)
        back = np.repeat(counts, counts) - 1 - within(counts)
        sample_end = end[rows] - back * self._stride
        sample_target = np.where(back == counts[rows] - 1, first[rows], sample_end - self._stride)
        self._samples = Samples(rows, np.maximum(sample_end - max_length - 1, 0), sample_end, sample_target)

    def __len__(self) -> int:
        return len(self._samples)

    def select(self, indices: ArrayLike) -> Samples:
        return self._samples[np.asarray(indices, dtype=np.int64)]


def trained_positions(samples: Samples) -> tuple[Int64, Int64]:
    """(sample, event index in its row) of every predicted event, each int64 [sum of num_labels], in sample order."""
    counts = samples.num_labels
    return np.repeat(np.arange(len(samples), dtype=np.int64), counts), ranges(samples.first_label, counts)
