"""Ranking samples: one user with all exposures of a window, the history before it, and what happened during it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .collator import CompactBatch, Fields, GenRecCollator, MicroBatch, SharedDraw
from .dataset import EventDataset
from .jagged import Int64, offsets_of, ranges, within
from .keyed import fold, keyed, string_key
from .windows import Samples

_SITE_CANDIDATE = string_key("grzoo/candidate")
_SITE_USER = string_key("grzoo/user")


@dataclass(frozen=True)
class RankingSamples(Samples):
    """Windows of exposures: events target_from <= i < end of `rows` are the candidates of a sample.

    Events begin <= i < end - 1 are its history; those from `recent_from` on are its real-time part, which overlaps the
    candidates. num_tokens: profile, history and candidates. All int64 [n].
    """

    recent_from: Int64
    num_tokens: Int64

    def __getitem__(self, index: ArrayLike | slice) -> "RankingSamples":
        at = index if isinstance(index, slice) else np.asarray(index)
        return RankingSamples(**{name: values[at] for name, values in vars(self).items()})

    @property
    def num_inputs(self) -> Int64:
        """Tokens of each sample, int64 [n]."""
        return self.num_tokens

    @property
    def num_history(self) -> Int64:
        """Events of each history, int64 [n]."""
        return np.maximum(self.end - 1 - self.begin, 0)

    @property
    def num_labels(self) -> Int64:
        """Candidates of each sample, int64 [n]."""
        return self.end - self.target_from


class ExposureWindows:
    """Cuts the targets of each row into windows of at most `max_candidates`.

    The real-time part of a sample starts `num_recent` events before its first candidate, or earlier where that would
    leave an event of the same second in the long-term part. max_length: most events of a history.
    """

    def __init__(
        self,
        dataset: EventDataset,
        max_length: int,
        *,
        max_candidates: int = 50,
        num_recent: int = 20,
        num_user_tokens: int = 0,
    ) -> None:
        if max_length < 1 or max_candidates < 1 or num_recent < 0:
            raise ValueError(
                f"max_length and max_candidates must be at least 1 and num_recent at least 0; got {max_length}, "
                f"{max_candidates}, {num_recent}"
            )
        if max_length < max_candidates + num_recent:
            raise ValueError(
                f"max_length={max_length} holds neither the {num_recent} recent events nor the {max_candidates} of a "
                "window: raise it above their sum, or lower max_candidates"
            )
        if not dataset.has_timestamps:
            raise ValueError(
                "ranking needs timestamps, and this data set has none: what a candidate sees depends on them"
            )
        self.dataset, self.max_length = dataset, max_length
        lengths, first = dataset.lengths.astype(np.int64), dataset.target_from.astype(np.int64)
        counts = -(-np.maximum(lengths - first, 0) // max_candidates)
        rows = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
        start = first[rows] + within(counts) * max_candidates
        end = np.minimum(start + max_candidates, lengths[rows])
        recent = np.maximum(np.minimum(start - num_recent, self._first_of_second(rows, start)), 0)
        begin = np.maximum(end - 1 - max_length, 0)
        recent = np.maximum(recent, begin)
        tokens = num_user_tokens + (end - 1 - begin) + (end - start)
        self._samples = RankingSamples(rows, begin, end, start, recent, tokens)

    def _first_of_second(self, rows: Int64, start: Int64) -> Int64:
        """Index of the first event of the row that has the time of event `start`."""
        place = start.copy()
        moving = np.flatnonzero(place > 0)
        times = self.dataset.events(rows, start, "timestamp")
        while len(moving):
            same = self.dataset.events(rows[moving], place[moving] - 1, "timestamp") == times[moving]
            moving = moving[same]
            place[moving] -= 1
            moving = moving[place[moving] > 0]
        return place

    def __len__(self) -> int:
        return len(self._samples)

    def select(self, indices: ArrayLike, epoch: int = 0) -> RankingSamples:
        """The samples `indices` (int [n]), the same in every epoch."""
        return self._samples[np.asarray(indices, dtype=np.int64)]


class RankingCollator(GenRecCollator):
    """Builds micro-batches of ranking samples from a dataset folder that was prepared with `ranking`.

    max_length: most events of a history.  seed: of the keys of dropout.  max_candidates, num_recent: see
    `ExposureWindows`. user_features, event_features, item_features, cross_features, tasks: names of event columns.

    A micro-batch of B users, T events and C candidates holds
        input_ids, timestamps, token_keys: int64 [1, T];  event_features, item_features: int64 [1, T, .]
        cu_seq_lens_q: int32 [B + 1];  num_recent, user_keys, user_ids: int64 [B];  user_features: int64 [B, .]
        candidate_ids, candidate_timestamps, candidate_keys: int64 [1, C];  candidate_features: int64 [1, C, .]
        cross_features: float32 [1, C, .];  labels: float32 [1, C, tasks], label_mask: bool [1, C, tasks]
        cu_seq_lens_candidates: int32 [B + 1]
    A label below 0 is unknown.
    """

    samples_type = RankingSamples

    def __init__(
        self,
        dataset: EventDataset,
        *,
        max_length: int,
        tasks: list[str],
        seed: int = 0,
        max_candidates: int = 50,
        num_recent: int = 20,
        user_features: list[str] | None = None,
        event_features: list[str] | None = None,
        item_features: list[str] | None = None,
        cross_features: list[str] | None = None,
    ) -> None:
        self.tasks, self.user_features = list(tasks), list(user_features or [])
        self.event_features, self.item_features = list(event_features or []), list(item_features or [])
        self.cross_features = list(cross_features or [])
        names = [*self.tasks, *self.user_features, *self.event_features, *self.item_features, *self.cross_features]
        missing = sorted(set(names) - set(dataset.feature_names))
        if missing:
            raise ValueError(
                f"the events have no columns {missing}; they have {list(dataset.feature_names)}: prepare the data set "
                "with --ranking"
            )

        def windows(of: EventDataset, longest: int) -> ExposureWindows:
            return ExposureWindows(
                of,
                longest,
                max_candidates=max_candidates,
                num_recent=num_recent,
                num_user_tokens=len(self.user_features),
            )

        super().__init__(dataset, max_length=max_length, seed=seed, windows=windows)

    def num_items(self, samples: Samples) -> tuple[int, ...]:
        """Known labels of the samples by task, each at least 1."""
        counts = samples.num_labels
        rows, events = np.repeat(samples.rows, counts), ranges(samples.target_from, counts)
        return tuple(max(1, int((self.dataset.events(rows, events, task) >= 0).sum())) for task in self.tasks)

    def longest_sample(self) -> int:
        """Tokens of the longest sample of the split."""
        windows = self.windows
        return int(windows.select(np.arange(len(windows))).num_inputs.max(initial=0))

    def compact(self, samples: Samples, step: int, shared: SharedDraw | None = None) -> CompactBatch:
        assert isinstance(samples, RankingSamples)
        stop = samples.begin + samples.num_history
        history = self.dataset.gather(
            samples.rows, samples.begin, stop, ("item_id", "timestamp", *self.event_features, *self.item_features)
        )
        exposed_names = ("item_id", "timestamp", *self.item_features, *self.cross_features, *self.tasks)
        exposed = self.dataset.gather(samples.rows, samples.target_from, samples.end, exposed_names)
        values = {f"event/{name}": column for name, column in history.columns.items()}
        values |= {f"candidate/{name}": column for name, column in exposed.columns.items()}
        values |= {
            f"user/{name}": self.dataset.events(samples.rows, samples.target_from, name) for name in self.user_features
        }
        return CompactBatch(samples, values, {})

    def expand(self, compact: CompactBatch, step: int, pin_memory: bool = False) -> MicroBatch:
        samples, values = compact.samples, compact.values
        assert isinstance(samples, RankingSamples)
        history, exposed = samples.num_history, samples.num_labels

        def stack(kind: str, names: list[str], count: int, dtype: Any = np.int64) -> NDArray[Any]:
            columns = [values[f"{kind}/{name}"].astype(dtype) for name in names]
            return np.stack(columns, axis=-1) if columns else np.zeros((count, 0), dtype=dtype)

        events, candidates, users = int(history.sum()), int(exposed.sum()), len(samples)
        user_keys = fold(fold(keyed(self.seed, step), samples.rows), samples.target_from)
        token_keys = fold(np.repeat(user_keys, history), ranges(samples.begin, history))
        exposed_keys = fold(np.repeat(fold(user_keys, _SITE_CANDIDATE), exposed), within(exposed))
        labels = stack("candidate", self.tasks, candidates, np.float32)
        arrays = {
            "input_ids": values["event/item_id"][None],
            "timestamps": values["event/timestamp"][None],
            "token_keys": token_keys.view(np.int64)[None],
            "event_features": stack("event", self.event_features, events)[None],
            "item_features": stack("event", self.item_features, events)[None],
            "cu_seq_lens_q": offsets_of(history).astype(np.int32),
            "num_recent": np.clip(samples.end - 1 - samples.recent_from, 0, history),
            "user_keys": fold(user_keys, _SITE_USER).view(np.int64),
            "user_ids": samples.rows,
            "user_features": stack("user", self.user_features, users),
            "candidate_ids": values["candidate/item_id"][None],
            "candidate_timestamps": values["candidate/timestamp"][None],
            "candidate_keys": exposed_keys.view(np.int64)[None],
            "candidate_features": stack("candidate", self.item_features, candidates)[None],
            "cross_features": stack("candidate", self.cross_features, candidates, np.float32)[None],
            "labels": labels[None],
            "label_mask": (labels >= 0)[None],
            "cu_seq_lens_candidates": offsets_of(exposed).astype(np.int32),
        }
        fields = Fields(events, pin_memory)
        for name, array in arrays.items():
            fields.copy(name, array)
        return fields.tensors


__all__ = ["ExposureWindows", "RankingCollator", "RankingSamples"]
