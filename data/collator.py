"""Jagged micro-batches in the names of transformers' flattening collator, and the global step that holds them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .dataset import EventDataset
from .jagged import offsets_of, ranges, within
from .keyed import UInt64, fold, keyed
from .negatives import SharedNegatives, UniformNegatives
from .windows import Int64, RecentFirst, Samples, WindowPolicy

MicroBatch = dict[str, torch.Tensor | int]


@dataclass
class GlobalStep:
    """One rank's share of an optimizer step, with what is global to it.

    step: number of the optimizer step, from 0.  epoch, cursor: position at which its global batch starts; end: the
    position after. micro_batches: this rank's, the same number on every rank, possibly empty ones.
    num_items_in_batch: trained positions over ALL ranks and micro-batches, the denominator of the loss (at least 1,
    so that a batch without any has loss 0).  num_users, num_tokens: of the global batch.
    """

    step: int
    epoch: int
    cursor: int
    micro_batches: list[MicroBatch]
    num_items_in_batch: int
    num_users: int
    num_tokens: int
    end: tuple[int, int] = (0, 0)

    def pin_memory(self) -> "GlobalStep":
        """The step with its tensors in pinned memory (called by torch's DataLoader)."""
        return replace(self, micro_batches=[_pinned(batch) for batch in self.micro_batches])


def _pinned(batch: MicroBatch) -> MicroBatch:
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@dataclass(frozen=True)
class SharedDraw:
    """Shared negatives of a step: item ids int64 [N] and their log q float32 [N]."""

    ids: Int64
    log_q: NDArray[np.float32]


class GenRecCollator:
    """Builds micro-batches from rows of an EventDataset.

    max_length: most inputs (tokens) of a sample.  seed: of the keys of dropout and negatives.  negatives: per
    position, shared by the step, or None.  features: further event columns to pass, as [1, T] beside `input_ids`.
    windows: the policy that cuts rows into samples; the default keeps the most recent events.

    A micro-batch of T tokens and B users (both may be 0) holds
        input_ids, position_ids, labels, timestamps, target_timestamps, token_keys: int64 [1, T]
        label_mask: bool [1, T], the label is trained
        cu_seq_lens_q: int32 [B + 1]
        max_length_q: int
        negative_ids: int64 [1, T, N], or [N] when shared, then with
        negative_log_q: float32 [N], and label_log_q: float32 [1, T]
        user_ids: int64 [B], row in the split
    `labels` is the item of the next event and `target_timestamps` its time; both time fields are absent when events
    have none.
    """

    def __init__(
        self,
        dataset: EventDataset,
        *,
        max_length: int,
        seed: int = 0,
        negatives: UniformNegatives | SharedNegatives | None = None,
        features: Sequence[str] = (),
        windows: WindowPolicy = RecentFirst,
    ) -> None:
        unknown = sorted(set(features) - set(dataset.feature_names))
        if unknown:
            raise ValueError(f"the events have no features {unknown}; they have {list(dataset.feature_names)}")
        self.dataset = dataset
        self.windows = windows(dataset, max_length)
        self.max_length = max_length
        self.seed = seed
        self.negatives = negatives
        self.features = tuple(name for name in features if name not in ("item_id", "timestamp"))

    def __call__(self, rows: ArrayLike, step: int = 0) -> MicroBatch:
        """One micro-batch of the samples `rows` (int [n]), which is the whole step: for a plain DataLoader."""
        samples = self.samples(rows)
        return self.micro_batch(samples, step, self.draw_shared(samples, step))

    def samples(self, indices: ArrayLike) -> Samples:
        """The samples `indices` that train at least one position."""
        samples = self.windows.select(indices)
        kept = samples.num_labels > 0
        return samples if kept.all() else samples[kept]

    def draw_shared(self, samples: Samples, step: int) -> SharedDraw | None:
        """The negatives that all positions of the step share, or None; `samples`: its whole global batch."""
        if not isinstance(self.negatives, SharedNegatives):
            return None
        ids = self.negatives.draw(self.windows, samples, self.seed, step)
        return SharedDraw(ids, self.negatives.log_q(ids))

    def micro_batch(self, samples: Samples, step: int, shared: SharedDraw | None = None) -> MicroBatch:
        """The jagged micro-batch of some samples of optimizer step `step`."""
        lengths = samples.num_inputs
        columns = ("item_id", *(("timestamp",) if self.dataset.has_timestamps else ()), *self.features)
        events = self.dataset.gather(samples.rows, samples.begin, samples.end, columns)
        # Every sample has one event more than inputs: inputs leave out its last event, labels its first.
        inputs = ranges(events.offsets[:-1], lengths)
        targets = inputs + 1
        place = within(lengths)
        event = np.repeat(samples.begin, lengths) + place
        fields = {
            "input_ids": events["item_id"][inputs],
            "position_ids": place,
            "labels": events["item_id"][targets],
            "label_mask": event + 1 >= np.repeat(samples.target_from, lengths),
            **{name: events[name][inputs] for name in self.features},
        }
        if self.dataset.has_timestamps:
            fields |= {"timestamps": events["timestamp"][inputs], "target_timestamps": events["timestamp"][targets]}
        keys = self._token_keys(samples, lengths, event, step)
        fields["token_keys"] = keys.view(np.int64)
        batch: MicroBatch = {name: torch.from_numpy(values)[None] for name, values in fields.items()}
        batch["cu_seq_lens_q"] = torch.from_numpy(offsets_of(lengths).astype(np.int32))
        batch["max_length_q"] = int(lengths.max(initial=0))
        batch["user_ids"] = torch.from_numpy(np.array(samples.rows))
        batch |= self._negatives(keys, fields["labels"], shared)
        return batch

    def _token_keys(self, samples: Samples, lengths: Int64, event: Int64, step: int) -> UInt64:
        users = fold(keyed(self.seed, step), samples.rows)
        return fold(np.repeat(users, lengths), event)

    def _negatives(self, keys: UInt64, labels: NDArray[Any], shared: SharedDraw | None) -> MicroBatch:
        if isinstance(self.negatives, UniformNegatives):
            return {"negative_ids": torch.from_numpy(self.negatives.draw(keys))[None]}
        if isinstance(self.negatives, SharedNegatives):
            assert shared is not None, "shared negatives are drawn from the global batch before its micro-batches"
            return {
                "negative_ids": torch.from_numpy(shared.ids),
                "negative_log_q": torch.from_numpy(shared.log_q),
                "label_log_q": torch.from_numpy(self.negatives.log_q(labels))[None],
            }
        return {}


class EvalCollator(GenRecCollator):
    """Micro-batches for ranking: no negatives, and what each user has already seen.

    Additional fields
        seen_item_ids: int64 [S], cu_seen: int32 [B + 1], all events of each user before its last label in the batch,
            also those older than `max_length`
        label_index: int64 [1, T], index of the label in its user's history. The first `label_index` of the user's
            seen items precede the label (all of them when a user has one target).
    """

    def micro_batch(self, samples: Samples, step: int, shared: SharedDraw | None = None) -> MicroBatch:
        batch = super().micro_batch(samples, step, shared)
        lengths = samples.num_inputs
        seen = self.dataset.gather(samples.rows, np.zeros_like(samples.end), samples.end - 1, ("item_id",))
        batch["seen_item_ids"] = torch.from_numpy(seen["item_id"])
        batch["cu_seen"] = torch.from_numpy(seen.offsets.astype(np.int32))
        batch["label_index"] = torch.from_numpy(np.repeat(samples.begin, lengths) + within(lengths) + 1)[None]
        return batch
