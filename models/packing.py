"""Packed (jagged) micro-batches and the padded form of them.

Inside the models T tokens of B sequences lie one behind the other; `cu_seq_lens` [B + 1] says where each starts. A
padded batch `[B, L]` with an `attention_mask` is packed at the door and unpacked on the way out. No id marks padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Fields of a micro-batch that hold one entry per token: [1, T] packed, [B, L] padded.
TOKEN_FIELDS = (
    "input_ids",
    "position_ids",
    "timestamps",
    "target_timestamps",
    "labels",
    "label_mask",
    "label_log_q",
    "token_keys",
)


@dataclass
class JaggedLayout:
    """Where each of the B sequences lies among T packed tokens, and when its events happened.

    Attributes:
        cu_seq_lens: int64 [B + 1] on the device of the tokens, starts of the sequences, the last entry is T.
        lengths: the B lengths on the host.
        timestamps: int64 [T] seconds, time of each event, or None.
        target_timestamps: int64 [T] seconds, time of the event to be predicted at each token, or None.
        cache: what an op derives from the layout and wants to share between the layers of one forward pass.

    Raises:
        ValueError: for times that are not one number per token.
    """

    cu_seq_lens: Tensor
    lengths: list[int]
    timestamps: Tensor | None = None
    target_timestamps: Tensor | None = None
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("timestamps", "target_timestamps"):
            times = getattr(self, name)
            if times is not None and times.shape != (self.num_tokens,):
                raise ValueError(
                    f"{name} has shape {tuple(times.shape)}, but there are {self.num_tokens} tokens: give one time per "
                    "token."
                )

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @classmethod
    def from_cu_seq_lens(
        cls, cu_seq_lens: Tensor, num_tokens: int, *, name: str = "cu_seq_lens_q", **times: Any
    ) -> "JaggedLayout":
        """Check `cu_seq_lens` [B + 1], in a batch under `name`, against the T tokens that it describes.

        Raises:
            ValueError: when it does not rise from 0 to `num_tokens`.
        """
        if cu_seq_lens.dim() != 1 or not _is_integer(cu_seq_lens):
            raise ValueError(
                f"{name} must be integers [B + 1]; got {cu_seq_lens.dtype} of shape {tuple(cu_seq_lens.shape)}."
            )
        starts = cu_seq_lens.tolist()
        lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
        if not starts or starts[0] != 0 or starts[-1] != num_tokens or any(length < 0 for length in lengths):
            raise ValueError(f"{name} must rise from 0 to the number of tokens, {num_tokens}; got {_shorten(starts)}.")
        return cls(cu_seq_lens.to(torch.int64), lengths, **times)


def is_padded(batch: Mapping[str, Any]) -> bool:
    """True for `[B, L]` input, which has no `cu_seq_lens_q`; False for packed `[1, T]` input."""
    return batch.get("cu_seq_lens_q") is None


def refuse_export() -> None:
    """Raise NotImplementedError under `torch.export`, which would say something of a symbol in its own graph."""
    if torch.compiler.is_exporting():
        raise NotImplementedError(
            "torch.export cannot hold this model: the lengths of a batch are read on the host, and rows come from "
            "tables that are no part of the graph. Serve it from the folder of save_pretrained; torch.compile works."
        )


def pack_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a padded micro-batch into a packed one; a packed one is checked and returned as it is.

    Args:
        batch: `input_ids` int64 [B, L] and `attention_mask` [B, L] (non-zero = token; without it all are tokens;
            left, right and scattered padding are alike), and any of `TOKEN_FIELDS` [B, L], `negative_ids` [B, L, N]
            or [N]. Packed: `cu_seq_lens_q` [B + 1], and [1, T] for [B, L].

    Returns:
        `input_ids` int64 [1, T], `position_ids` (from 0 in each sequence unless given), `cu_seq_lens_q` int32 [B + 1],
        `max_length_q`, and the other fields, packed. Fields that are None are left out.

    Raises:
        ValueError: when a field does not have the shape of `input_ids`.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6], [7, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
        >>> pack_batch(batch)["input_ids"]
        tensor([[5, 6, 7]])
    """
    refuse_export()
    batch = {name: value for name, value in batch.items() if value is not None}
    if not is_padded(batch):
        if "attention_mask" in batch:
            raise ValueError(
                "A batch is packed (cu_seq_lens_q) or padded (attention_mask), not both: give one of them."
            )
        shape = batch["input_ids"].shape
        if len(shape) != 2 or shape[0] != 1:
            raise ValueError(
                f"Packed input_ids must have shape [1, T]; got {tuple(shape)}: put the sequences one behind the other, "
                "or leave cu_seq_lens_q out and give [B, L] with an attention_mask."
            )
        _check_shapes(batch)
        return batch
    input_ids = batch["input_ids"]
    if input_ids.dim() != 2:
        raise ValueError(f"Padded input_ids must have shape [B, L]; got {tuple(input_ids.shape)}.")
    mask = batch.pop("attention_mask", None)
    mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}.")
    _check_shapes(batch)
    names = _token_fields(batch)
    packed = {name: value[mask].unsqueeze(0) if name in names else value for name, value in batch.items()}
    lengths = mask.sum(1)
    packed["cu_seq_lens_q"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed["max_length_q"] = int(lengths.max()) if lengths.numel() else 0
    packed.setdefault("position_ids", (mask.long().cumsum(1) - 1)[mask].unsqueeze(0))
    return packed


def unpack(packed: Tensor, attention_mask: Tensor) -> Tensor:
    """Put packed rows [1, T, ...] back to their places in [B, L, ...]; padding is zero."""
    mask = attention_mask.bool()
    return packed.new_zeros((*mask.shape, *packed.shape[2:])).masked_scatter(
        mask.reshape(*mask.shape, *[1] * (packed.dim() - 2)), packed
    )


def packed_positions(layout: JaggedLayout) -> Tensor:
    """int64 [T]: 0, 1, ... in each sequence."""
    lengths = layout.cu_seq_lens.diff()
    starts = torch.repeat_interleave(layout.cu_seq_lens[:-1], lengths, output_size=layout.num_tokens)
    return torch.arange(layout.num_tokens, device=starts.device) - starts


def next_timestamps(layout: JaggedLayout, timestamps: Tensor, request_timestamps: Tensor | None) -> Tensor:
    """Time of the event after each token: of the next event of the sequence, of the request at its end.

    Args:
        timestamps: int64 [T] seconds.
        request_timestamps: int64 [B] seconds, when the user asks; None: at the time of the last event.

    Returns:
        int64 [T].
    """
    if request_timestamps is not None and request_timestamps.shape != (len(layout.lengths),):
        raise ValueError(
            f"request_timestamps must hold one time per user, [{len(layout.lengths)}]; "
            f"got shape {tuple(request_timestamps.shape)}."
        )
    if request_timestamps is not None:
        _check_seconds("request_timestamps", request_timestamps)
    following = torch.cat([timestamps[1:], timestamps[-1:]])
    not_empty = layout.cu_seq_lens.diff() > 0
    last = layout.cu_seq_lens[1:][not_empty] - 1
    at_end = timestamps[last] if request_timestamps is None else request_timestamps.to(timestamps)[not_empty]
    return following.index_copy(0, last, at_end)


def check_times(layout: JaggedLayout, timestamps: Tensor, target_timestamps: Tensor | None = None) -> None:
    """Raise ValueError for times that are no whole seconds, negative, or fall within a sequence.

    Args:
        timestamps: int64 [T] seconds.
        target_timestamps: int64 [T] seconds, time of the event after each one, or None: must not precede it.
    """
    _check_seconds("timestamps", timestamps)
    falls = timestamps.diff() < 0
    starts = torch.zeros(layout.num_tokens + 1, dtype=torch.bool, device=falls.device)
    starts[layout.cu_seq_lens] = True
    falls &= ~starts[1 : layout.num_tokens]  # from one history to the next
    problems = [(timestamps < 0).any(), falls.any()]
    if target_timestamps is not None:
        _check_seconds("target_timestamps", target_timestamps)
        problems.append((target_timestamps < timestamps).any())
    if not bool(torch.stack(problems).any()):  # one wait for the device
        return
    if bool(problems[0]):
        raise ValueError(f"timestamp {int(timestamps.min())} is negative; timestamps are seconds since 1970.")
    if bool(problems[1]):
        raise ValueError(
            f"timestamps fall after event {int(falls.nonzero()[0])} of the batch: sort each history by time."
        )
    assert target_timestamps is not None
    at = int((target_timestamps < timestamps).nonzero()[0])
    raise ValueError(
        f"the time after event {at} of the batch is {int(target_timestamps[at])}, before the event itself at "
        f"{int(timestamps[at])}: target_timestamps are those of the next events, and at the end of a history "
        "request_timestamps when the user asks; neither precedes the event."
    )


def dropout_keys(batch: Mapping[str, Any]) -> Tensor:
    """int64 [T]: the keys that a packed batch brings for dropout, else new ones from torch's default generator."""
    if batch.get("token_keys") is not None:
        keys: Tensor = batch["token_keys"].flatten()
        return keys
    ids = batch["input_ids"]
    return torch.randint(-(2**63), 2**63 - 1, (ids.shape[1],), device=ids.device)


def keep_last(batch: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """Truncate each sequence of a packed batch to its last `max_length` events.

    `position_ids`, where there are any, go down by the number of events that were cut off: those of the collator
    restart at 0.
    """
    starts = batch["cu_seq_lens_q"].long()
    lengths = starts.diff()
    if not lengths.numel() or int(lengths.max()) <= max_length:
        return dict(batch)
    num_tokens = int(batch["input_ids"].shape[1])
    remaining = torch.repeat_interleave(starts[1:], lengths, output_size=num_tokens)
    keep = remaining - torch.arange(num_tokens, device=starts.device) <= max_length
    names = _token_fields(batch)
    kept = {name: value[:, keep] if name in names else value for name, value in batch.items()}
    if "position_ids" in kept:
        cut = torch.repeat_interleave((lengths - max_length).clamp(min=0), lengths, output_size=num_tokens)
        kept["position_ids"] = kept["position_ids"] - cut[keep]
    lengths = lengths.clamp(max=max_length)
    kept["cu_seq_lens_q"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    kept["max_length_q"] = max_length
    return kept


def _token_fields(batch: Mapping[str, Any]) -> list[str]:
    """The names of the fields that a batch has for each token."""
    names = [name for name in TOKEN_FIELDS if name in batch]
    return [*names, "negative_ids"] if "negative_ids" in batch and batch["negative_ids"].dim() == 3 else names


def _check_shapes(batch: Mapping[str, Any]) -> None:
    """Raise ValueError unless every field of the tokens has the shape of `input_ids`, negatives one size more."""
    wanted = batch["input_ids"].shape
    for name in _token_fields(batch):
        shape = batch[name].shape
        if (shape[:2] if name == "negative_ids" else shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(shape)}, but input_ids {tuple(wanted)}: they must agree.")


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _check_seconds(name: str, times: Tensor) -> None:
    if not _is_integer(times):
        raise ValueError(f"{name} must be whole seconds, int64; got {times.dtype}: fill in NaN and round before.")


def _shorten(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}]"
