"""A micro-batch of a ranking model: users with a history each and any number of candidates, packed."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from grzoo.models.packing import JaggedLayout, check_times, packed_positions, refuse_export
from torch import Tensor

from .configuration_ranking import RankingConfig

_EVENT_FIELDS = ("input_ids", "timestamps", "event_features", "item_features", "token_keys")
_CANDIDATE_FIELDS = (
    "candidate_ids",
    "candidate_timestamps",
    "candidate_features",
    "cross_features",
    "labels",
    "label_mask",
    "candidate_keys",
)
_USER_FIELDS = ("user_features", "num_recent", "user_keys")
_LAYOUT_FIELDS = ("cu_seq_lens_q", "cu_seq_lens_candidates", "attention_mask", "candidate_mask")
_UNREAD_FIELDS = ("user_ids",)  # of a collator's micro-batch
_NUMBERS = ("cross_features", "labels", "label_mask")  # the other fields are int64
_NO_TIME = 1 << 62  # later than any candidate


@dataclass
class RankingBatch:
    """T events of B histories and C candidates, packed; what a model without such features does not read is empty.

    Attributes:
        layout: the B histories among the T events.
        candidates: the B groups of candidates among the C.
        input_ids: int64 [T].  timestamps: int64 [T] seconds, rising in each history.
        event_features: int64 [T, E] ids.  item_features: int64 [T, M] bits.
        num_recent: int64 [B], how many of a history's last events are its real-time part.
        user_features: int64 [B, P] ids.
        candidate_ids: int64 [C].  candidate_timestamps: int64 [C] seconds.  candidate_features: int64 [C, M] bits.
        cross_features: float32 [C, F].
        labels: float32 [C, tasks] or None.  label_mask: bool [C, tasks] or None (all are known).
        token_keys int64 [T], candidate_keys int64 [C], user_keys int64 [B]: of dropout, or None.
    """

    layout: JaggedLayout
    candidates: JaggedLayout
    input_ids: Tensor
    timestamps: Tensor
    event_features: Tensor
    item_features: Tensor
    num_recent: Tensor
    user_features: Tensor
    candidate_ids: Tensor
    candidate_timestamps: Tensor
    candidate_features: Tensor
    cross_features: Tensor
    labels: Tensor | None = None
    label_mask: Tensor | None = None
    token_keys: Tensor | None = None
    candidate_keys: Tensor | None = None
    user_keys: Tensor | None = None

    @classmethod
    @torch.compiler.disable  # checks that the host reads; inductor fails on what is between them
    def from_fields(cls, given: Mapping[str, Any], config: RankingConfig) -> "RankingBatch":
        """Check and pack the fields of `GenRecForRanking.forward`, which describes them.

        Raises:
            ValueError: for fields that are missing, of another shape or dtype, unsorted or negative times, a long-term
            event that is not before its user's candidates, dense features that are not finite, known labels outside
            [0, 1].
        """
        refuse_export()
        given = {name: value for name, value in given.items() if value is not None}
        _require(given, config)
        layout, events = _pack(given, "input_ids", "cu_seq_lens_q", "attention_mask", _EVENT_FIELDS)
        candidates, exposed = _pack(
            given, "candidate_ids", "cu_seq_lens_candidates", "candidate_mask", _CANDIDATE_FIELDS
        )
        users = len(layout.lengths)
        if len(candidates.lengths) != users:
            raise ValueError(f"there are {users} histories, but {len(candidates.lengths)} groups of candidates.")
        values = {**events, **exposed, **{name: given[name] for name in _USER_FIELDS if name in given}}
        brings_recent = "num_recent" in values
        values.setdefault("num_recent", layout.cu_seq_lens.diff())
        _fill_absent(values, layout.num_tokens, candidates.num_tokens, users)
        known = {field.name for field in fields(cls)}
        batch = cls(layout, candidates, **{name: value for name, value in values.items() if name in known})
        batch._check_widths(config)
        batch._check_values(config)
        if brings_recent:
            batch._check_recent()
        elif config.num_recent is not None:
            batch.num_recent = batch._recent_from_first_candidate(config.num_recent)
        return batch

    def _check_widths(self, config: RankingConfig) -> None:
        tasks, users = len(config.tasks or []), len(self.layout.lengths)
        events, candidates = self.layout.num_tokens, self.candidates.num_tokens
        wanted: dict[str, tuple[int, ...]] = {
            "input_ids": (events,),
            "timestamps": (events,),
            "token_keys": (events,),
            "event_features": (events, len(config.event_features or [])),
            "item_features": (events, len(config.item_features or {})),
            "candidate_ids": (candidates,),
            "candidate_timestamps": (candidates,),
            "candidate_keys": (candidates,),
            "candidate_features": (candidates, len(config.item_features or {})),
            "cross_features": (candidates, len(config.cross_features or [])),
            "labels": (candidates, tasks),
            "label_mask": (candidates, tasks),
            "user_features": (users, len(config.user_features or [])),
            "user_keys": (users,),
            "num_recent": (users,),
        }
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} after packing, expected {shape} for {users} users, "
                    f"{events} events and {candidates} candidates: a last size follows the names in the model's config."
                )
            if name not in _NUMBERS and (value.is_floating_point() or value.dtype == torch.bool):
                raise ValueError(f"{name} has dtype {value.dtype}, expected int64: convert it with .long().")

    def _check_values(self, config: RankingConfig) -> None:
        finite = torch.isfinite(self.cross_features)
        if not bool(finite.all()):
            at, feature = (int(x) for x in (~finite).nonzero()[0])
            names = config.cross_features or []
            raise ValueError(
                f"cross feature {names[feature]!r} of candidate {at} is {float(self.cross_features[at, feature])}: "
                "dense features must be finite; fill what is unknown with a fixed value before."
            )
        check_times(self.layout, self.timestamps)
        if bool((self.candidate_timestamps < 0).any()):
            raise ValueError(
                f"candidate timestamp {int(self.candidate_timestamps.min())} is negative; timestamps are seconds since "
                "1970."
            )
        if self.labels is not None:
            wrong = ~((self.labels >= 0) & (self.labels <= 1))
            if self.label_mask is not None:
                wrong &= self.label_mask.bool()
            if bool(wrong.any()):
                at, task = (int(x) for x in wrong.nonzero()[0])
                raise ValueError(
                    f"label {(config.tasks or [])[task]!r} of candidate {at} is {float(self.labels[at, task])}: known "
                    "labels lie in [0, 1]; mark an unknown one in label_mask."
                )

    def _check_recent(self) -> None:
        if bool((self.num_recent < 0).any()):
            raise ValueError(f"num_recent is {int(self.num_recent.min())}; it counts events: give 0 or more.")
        if not self.layout.num_tokens:
            return
        counts = self.layout.cu_seq_lens.diff() - self.num_recent
        last = self.layout.cu_seq_lens[:-1] + counts - 1
        times = self.timestamps[last.clamp(min=0)]
        late = (counts > 0) & (times >= self.first_candidate_times)
        if bool(late.any()):
            user = int(late.nonzero()[0])
            raise ValueError(
                f"the last long-term event of user {user} of the batch, at {int(times[user])}, is not before the "
                f"user's first candidate, at {int(self.first_candidate_times[user])}: every candidate sees the "
                "long-term events. Raise num_recent, so that such events are real-time ones."
            )

    def _recent_from_first_candidate(self, num_recent: int) -> Tensor:
        """int64 [B]: the last `num_recent` events before the user's first candidate, and all that are not before."""
        lengths = self.layout.cu_seq_lens.diff()
        owner = torch.repeat_interleave(lengths, output_size=self.layout.num_tokens)
        is_late = (self.timestamps >= self.first_candidate_times[owner]).long()
        return torch.minimum(torch.zeros_like(lengths).index_add(0, owner, is_late) + num_recent, lengths)

    @cached_property
    def first_candidate_times(self) -> Tensor:
        """int64 [B]: time of each user's first candidate; 2^62 for a user without one."""
        counts = self.candidates.cu_seq_lens.diff()
        owner = torch.repeat_interleave(counts, output_size=self.candidates.num_tokens)
        first = torch.full(counts.shape, _NO_TIME, dtype=torch.int64, device=counts.device)
        return first.scatter_reduce(0, owner, self.candidate_timestamps.long(), "amin")

    def keep_last(self, max_length: int) -> "RankingBatch":
        """Each history cut to its last `max_length` events."""
        if self.layout.max_length <= max_length:
            return self
        lengths = self.layout.cu_seq_lens.diff()
        left = torch.repeat_interleave(lengths, lengths) - packed_positions(self.layout)
        keep = left <= max_length
        starts = torch.nn.functional.pad(lengths.clamp(max=max_length).cumsum(0), (1, 0))
        kept = {name: getattr(self, name)[keep] for name in _EVENT_FIELDS if getattr(self, name) is not None}
        return replace(self, layout=JaggedLayout.from_cu_seq_lens(starts, int(keep.sum())), **kept)

    def with_keys(self) -> "RankingBatch":
        """With dropout keys drawn from torch's generator where the batch brings none."""

        def draw(like: Tensor) -> Tensor:
            return torch.randint(-(2**63), 2**63 - 1, (like.shape[0],), device=like.device)

        return replace(
            self,
            token_keys=draw(self.input_ids) if self.token_keys is None else self.token_keys,
            candidate_keys=draw(self.candidate_ids) if self.candidate_keys is None else self.candidate_keys,
            user_keys=draw(self.num_recent) if self.user_keys is None else self.user_keys,
        )

    def without_keys(self) -> "RankingBatch":
        """Without dropout keys: nothing is dropped."""
        return replace(self, token_keys=None, candidate_keys=None, user_keys=None)

    @property
    def is_recent(self) -> Tensor:
        """bool [T]: the event is of the real-time part."""
        lengths = self.layout.cu_seq_lens.diff()
        first = torch.repeat_interleave(lengths - self.num_recent, lengths, output_size=self.layout.num_tokens)
        return packed_positions(self.layout) >= first


def check_names(given: Mapping[str, Any]) -> None:
    """Raises ValueError for the name of a field that no ranking batch has."""
    known = {*_EVENT_FIELDS, *_CANDIDATE_FIELDS, *_USER_FIELDS, *_LAYOUT_FIELDS, *_UNREAD_FIELDS}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {sorted(known)}."
            raise ValueError(f"a ranking batch has no field {name!r}: {hint}")


def token_order(batch: RankingBatch, num_user_tokens: int) -> tuple[JaggedLayout, Tensor]:
    """Where profile tokens, events and candidates go when each user's stand one behind the other.

    Returns:
        The layout of all N = B P + T + C tokens, and int64 [N]: place of each token of the concatenation of the B P
        profile tokens, the T events and the C candidates.
    """
    events, candidates = batch.layout, batch.candidates
    users = len(events.lengths)
    device = events.cu_seq_lens.device
    starts = num_user_tokens * torch.arange(users + 1, device=device) + events.cu_seq_lens + candidates.cu_seq_lens
    profile = (starts[:-1, None] + torch.arange(num_user_tokens, device=device)).flatten()
    first_event = starts[:-1] + num_user_tokens
    first_candidate = first_event + events.cu_seq_lens.diff()
    places = [profile]
    for first, layout in ((first_event, events), (first_candidate, candidates)):
        counts = layout.cu_seq_lens.diff()
        repeated = torch.repeat_interleave(first, counts, output_size=layout.num_tokens)
        places.append(repeated + packed_positions(layout))
    lengths = [num_user_tokens + e + c for e, c in zip(events.lengths, candidates.lengths, strict=True)]
    return JaggedLayout(starts, lengths), torch.cat(places)


def _require(given: Mapping[str, Any], config: RankingConfig) -> None:
    for name in ("input_ids", "candidate_ids", "timestamps", "candidate_timestamps"):
        if name not in given:
            raise ValueError(f"{name} is missing: a ranking model needs the histories, the candidates and their times.")
    if config.cross_features and "cross_features" not in given:
        raise ValueError(
            f"the candidates come without cross_features, and this model reads {config.cross_features}: compute them "
            "from what happened before each candidate, or train a model with cross_features: []."
        )
    needs = {
        "user_features": config.user_features,
        "event_features": config.event_features,
        "item_features": config.item_features,
        "candidate_features": config.item_features,
    }
    for name, names in needs.items():
        if names and name not in given:
            raise ValueError(f"{name} is missing, and this model reads {list(names)}.")


def _pack(
    given: Mapping[str, Any], ids: str, starts: str, mask_name: str, names: tuple[str, ...]
) -> tuple[JaggedLayout, dict[str, Tensor]]:
    """The layout of `ids`, and the fields of `names` as [tokens, ...]."""
    shape = given[ids].shape
    if len(shape) != 2 or (starts in given and shape[0] != 1):
        want = f"[1, tokens], since the batch is packed ({starts})" if starts in given else "[users, tokens], padded"
        raise ValueError(f"{ids} has shape {tuple(shape)}, expected {want}.")
    for name in names:
        if name in given and given[name].shape[:2] != shape:
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}, but {ids} {tuple(shape)}: they must agree.")
    present = [name for name in names if name in given]
    if starts in given:
        if mask_name in given:
            raise ValueError(f"A batch is packed ({starts}) or padded ({mask_name}), not both: give one of them.")
        layout = JaggedLayout.from_cu_seq_lens(given[starts], shape[1], name=starts)
        return layout, {name: given[name][0] for name in present}
    mask = given.get(mask_name)
    mask = torch.ones(shape, dtype=torch.bool, device=given[ids].device) if mask is None else mask.bool()
    if mask.shape != shape:
        raise ValueError(f"{mask_name} has shape {tuple(mask.shape)}, {ids} {tuple(shape)}.")
    cu_seq_lens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    layout = JaggedLayout.from_cu_seq_lens(cu_seq_lens, int(cu_seq_lens[-1]))
    return layout, {name: given[name][mask] for name in present}


def _fill_absent(values: dict[str, Any], events: int, candidates: int, users: int) -> None:
    device = values["input_ids"].device
    counts = {
        "user_features": users,
        "event_features": events,
        "item_features": events,
        "candidate_features": candidates,
    }
    for name, count in counts.items():
        values.setdefault(name, torch.zeros(count, 0, dtype=torch.int64, device=device))
    values.setdefault("cross_features", torch.zeros(candidates, 0, device=device))
