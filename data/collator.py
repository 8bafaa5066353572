"""Jagged micro-batches in the names of transformers' flattening collator, and the global step that holds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .dataset import EventDataset
from .jagged import offsets_of, within
from .keyed import UInt64, fold, fold_repeated, keyed, word_table
from .negatives import AllItems, SharedNegatives, UniformNegatives
from .windows import Int64, RecentFirst, Samples, WindowPolicy

MicroBatch = dict[str, torch.Tensor | int]
Arrays = dict[str, NDArray[Any]]


@dataclass
class GlobalStep:
    """One rank's share of an optimizer step, with what is global to it.

    step: number of the optimizer step, from 0.  epoch, cursor: position at which its global batch starts; end: the
    position after. micro_batches: this rank's, the same number on every rank, possibly empty ones.
    num_items_in_batch: trained positions over ALL ranks and micro-batches, the denominator of the loss (at least 1,
    so that a batch without any has loss 0); one number per task where there are several labels.
    num_users, num_tokens: of the global batch.
    """

    step: int
    epoch: int
    cursor: int
    micro_batches: list[MicroBatch]
    num_items_in_batch: int | tuple[int, ...]
    num_users: int
    num_tokens: int
    end: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class SharedDraw:
    """Shared negatives of a step: item ids int64 [N] and their log q float32 [N]."""

    ids: Int64
    log_q: NDArray[np.float32]


@dataclass
class CompactBatch:
    """A micro-batch as it travels from a worker: what is read or drawn; what follows from it is computed on arrival.

    samples: its samples.  values: name -> inputs [T] of each event column, and `last_item_id`, `last_timestamp` [B],
    the last event of each sample, which is a label only.  drawn: finished fields, such as negatives.
    """

    samples: Samples
    values: Arrays
    drawn: Arrays


class GenRecCollator:
    """Builds micro-batches from rows of an EventDataset.

    max_length: most inputs (tokens) of a sample.  seed: of the keys of dropout and negatives.  negatives: per
    position, shared by the step, all items, or None.  features: further event columns to pass, as [1, T] beside
    `input_ids`.
    windows: the policy that cuts rows into samples; the default keeps the most recent events.

    A subclass adds fields that are read or drawn in `compact`, which runs in the worker, and those that follow from
    them in `expand`, which runs where the step is used.

    A micro-batch of T tokens and B users (both may be 0) holds
        input_ids, position_ids, labels, timestamps, target_timestamps, token_keys: int64 [1, T]
        label_mask: bool [1, T], the label is trained
        cu_seq_lens_q: int32 [B + 1]
        max_length_q: int
        negative_ids: int64 [1, T, N]; [C] when they are all items; or [N] when shared, then with
        negative_log_q: float32 [N], and label_log_q: float32 [1, T]
        user_ids: int64 [B], row in the split
    `labels` is the item of the next event and `target_timestamps` its time; both time fields are absent when events
    have none.
    """

    samples_type: type[Samples] = Samples

    def __init__(
        self,
        dataset: EventDataset,
        *,
        max_length: int,
        seed: int = 0,
        negatives: UniformNegatives | SharedNegatives | AllItems | None = None,
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
        self._words = word_table(0)

    def __call__(self, rows: ArrayLike, step: int = 0) -> MicroBatch:
        """One micro-batch of the samples `rows` (int [n]), which is the whole step: for a plain DataLoader."""
        samples = self.samples(rows)
        return self.micro_batch(samples, step, self.draw_shared(samples, step))

    def samples(self, indices: ArrayLike, epoch: int = 0) -> Samples:
        """The samples `indices` of an epoch that train at least one position."""
        samples = self.windows.select(indices, epoch)
        kept = samples.num_labels > 0
        return samples if kept.all() else samples[kept]

    def num_items(self, samples: Samples) -> int | tuple[int, ...]:
        """The denominator of the loss of a step of these samples, at least 1."""
        return max(1, int(samples.num_labels.sum()))

    def longest_sample(self) -> int:
        """Tokens of the longest sample of the split."""
        return min(self.max_length, int(self.dataset.lengths.max(initial=1)) - 1)

    def draw_shared(self, samples: Samples, step: int) -> SharedDraw | None:
        """The negatives that all positions of the step share, or None; `samples`: its whole global batch."""
        if not isinstance(self.negatives, SharedNegatives):
            return None
        ids = self.negatives.draw(self.windows, samples, self.seed, step)
        return SharedDraw(ids, self.negatives.log_q(ids))

    def micro_batch(self, samples: Samples, step: int, shared: SharedDraw | None = None) -> MicroBatch:
        """The jagged micro-batch of some samples of optimizer step `step`."""
        return self.expand(self.compact(samples, step, shared), step)

    def compact(self, samples: Samples, step: int, shared: SharedDraw | None = None) -> CompactBatch:
        """What is read of the samples or drawn for them: each event once, in the dtype of the file."""
        lengths = samples.num_inputs
        names = ("item_id", *(("timestamp",) if self.dataset.has_timestamps else ()), *self.features)
        inputs = dict(self.dataset.gather(samples.rows, samples.begin, samples.begin + lengths, names).columns)
        last = {
            f"last_{name}": self.dataset.events(samples.rows, samples.end - 1, name)
            for name in names
            if name not in self.features
        }
        return CompactBatch(samples, {**inputs, **last}, self._negatives(samples, inputs, last, step, shared))

    def expand(self, compact: CompactBatch, step: int, pin_memory: bool = False) -> MicroBatch:
        """The micro-batch of what `compact` returned; its tensors own their memory, pinned if asked."""
        samples, values = compact.samples, compact.values
        lengths = samples.num_inputs
        fields = Fields(int(lengths.sum()), pin_memory)
        fields.copy("input_ids", values["item_id"][None])
        shift(values["item_id"], values["last_item_id"], lengths, out=fields.new("labels"))
        if "timestamp" in values:
            fields.copy("timestamps", values["timestamp"][None])
            shift(values["timestamp"], values["last_timestamp"], lengths, out=fields.new("target_timestamps"))
        for name in self.features:
            fields.copy(name, values[name][None])
        positions = fields.new("position_ids")
        positions[:] = within(lengths)
        events = _events(samples, positions)
        mask = fields.new("label_mask", np.bool_)
        mask[:] = True
        if (samples.target_from > samples.begin + 1).any():
            np.greater_equal(events + 1, np.repeat(samples.target_from, lengths), out=mask)
        self._token_keys(samples, events, step, out=fields.new("token_keys").view(np.uint64))
        fields.copy("cu_seq_lens_q", offsets_of(lengths).astype(np.int32))
        fields.copy("user_ids", samples.rows)
        for name, drawn in compact.drawn.items():
            fields.copy(name, drawn)
        return {**fields.tensors, "max_length_q": int(lengths.max(initial=0))}

    def _token_keys(self, samples: Samples, events: Int64, step: int, out: UInt64) -> UInt64:
        """`keyed(seed, step, row, event)` of every input, uint64 [T]."""
        needed = int(samples.end.max(initial=0))
        if needed > len(self._words):
            self._words = word_table(2 * needed)
        users = fold(keyed(self.seed, step), samples.rows)
        fold_repeated(users, samples.num_inputs, self._words, events, out)
        return out

    def _negatives(
        self, samples: Samples, inputs: Arrays, last: Arrays, step: int, shared: SharedDraw | None
    ) -> Arrays:
        lengths = samples.num_inputs
        if isinstance(self.negatives, UniformNegatives):
            events = _events(samples, within(lengths))
            keys = self._token_keys(samples, events, step, np.empty(len(events), dtype=np.uint64))
            return {"negative_ids": self.negatives.draw(keys)[None]}
        if isinstance(self.negatives, AllItems):
            return {"negative_ids": self.negatives.ids}
        if isinstance(self.negatives, SharedNegatives):
            assert shared is not None, "shared negatives are drawn from the global batch before its micro-batches"
            labels = np.empty_like(inputs["item_id"])
            shift(inputs["item_id"], last["last_item_id"], lengths, out=labels)
            log_q = self.negatives.log_q(labels)[None]
            return {"negative_ids": shared.ids, "negative_log_q": shared.log_q, "label_log_q": log_q}
        return {}


class EvalCollator(GenRecCollator):
    """Micro-batches for ranking: no negatives, and what each user has already seen.

    Additional fields
        seen_item_ids: int64 [S], cu_seen: int64 [B + 1], all events of each user before its last label in the batch,
            also those older than `max_length`
        label_index: int64 [1, T], index of the label in its user's history. The first `label_index` of the user's
            seen items precede the label (all of them when a user has one target).
    """

    def compact(self, samples: Samples, step: int, shared: SharedDraw | None = None) -> CompactBatch:
        compact = super().compact(samples, step, shared)
        seen = self.dataset.gather(samples.rows, np.zeros_like(samples.end), samples.end - 1, ("item_id",))
        compact.drawn.update(seen_item_ids=seen["item_id"], cu_seen=seen.offsets)
        return compact

    def expand(self, compact: CompactBatch, step: int, pin_memory: bool = False) -> MicroBatch:
        batch = super().expand(compact, step, pin_memory)
        positions = batch["position_ids"]
        assert isinstance(positions, torch.Tensor)
        fields = Fields(positions.numel(), pin_memory)
        np.add(_events(compact.samples, positions.numpy()[0]), 1, out=fields.new("label_index"))
        return batch | fields.tensors


class Fields:
    """Tensors of a micro-batch of `num_tokens` tokens while it is filled, in pinned memory if asked."""

    def __init__(self, num_tokens: int, pin_memory: bool) -> None:
        self.tensors: MicroBatch = {}
        self._num_tokens, self._pin_memory = num_tokens, pin_memory

    def new(self, name: str, dtype: DTypeLike = np.int64) -> NDArray[Any]:
        """A new field [1, T], to be filled through the flat view [T] that is returned."""
        return self._empty(name, (1, self._num_tokens), np.dtype(dtype))[0]

    def copy(self, name: str, values: NDArray[Any]) -> None:
        """A new field with the shape and the values of an array."""
        np.copyto(self._empty(name, values.shape, values.dtype), values)

    def _empty(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        kind = torch.from_numpy(np.empty(0, dtype=dtype)).dtype
        tensor = torch.empty(shape, dtype=kind, pin_memory=self._pin_memory)
        self.tensors[name] = tensor
        values: NDArray[Any] = tensor.numpy()
        return values


def shift(inputs: NDArray[Any], last: NDArray[Any], lengths: Int64, out: NDArray[Any]) -> None:
    """Write into `out` [T] what follows each input [T]: the next one of its sample, `last` [B] after the last."""
    out[:-1] = inputs[1:]
    filled = lengths > 0
    out[np.cumsum(lengths)[filled] - 1] = last[filled]


def _events(samples: Samples, positions: Int64) -> Int64:
    """Index in its row of every input, int64 [T], from its position in the sample."""
    return positions + np.repeat(samples.begin, samples.num_inputs) if samples.begin.any() else positions
