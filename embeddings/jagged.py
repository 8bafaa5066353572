"""What a feature may be given: ids of any shape, or jagged bags of ids; checked, and cut into bags where it pools."""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import FeatureConfig
from .transfer import move


class Jagged(NamedTuple):
    """Bags of ids: bag b holds values[offsets[b] : offsets[b + 1]], which may be nothing.

    Fields:
        values: int64 [n], the ids of all bags.
        offsets: int64 or int32 [bags + 1], from 0 to n (transformers' `cu_seq_lens_q` is one).
        weights: float32 [n], a factor of each row in a feature with pooling="sum"; may require gradients. None: 1.

    All on one device. The lookup checks them, not the constructor: there a mistake on one rank stops all ranks.

    Example:
        Jagged(torch.tensor([7, 8, 9]), torch.tensor([0, 2, 2, 3]))  # [7, 8], [], [9]
    """

    values: Tensor
    offsets: Tensor
    weights: Tensor | None = None

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor, weights: Tensor | None = None) -> "Jagged":
        """Build from the number of ids in each bag, integers [bags]."""
        return cls(values, torch.cat([lengths.new_zeros(1), lengths]).cumsum(0), weights)


FeatureInput = Tensor | Jagged


class Bags(NamedTuple):
    """How the rows of a feature become one per bag."""

    offsets: Tensor  # int64 [bags + 1]
    total: int  # n, ids in all bags
    weights: Tensor | None  # float32 [n]
    mean: bool
    shape: tuple[int, ...]  # of the bags

    def to(self, device: torch.device) -> "Bags":
        """Return the bags on a device; gradients of weights go back to where those were given."""
        weights = self.weights
        if weights is not None:  # a copy that is queued (see move) has no gradient
            weights = weights.to(device) if weights.requires_grad else move([weights], device)[0]
        return self._replace(offsets=move([self.offsets], device)[0], weights=weights)

    @property
    def lengths(self) -> Tensor:
        """Ids in each bag, int64 [bags]."""
        return self.offsets.diff()

    @property
    def numbers(self) -> Tensor:
        """The bag of each id, int64 [n]."""
        bags = torch.arange(len(self.offsets) - 1, dtype=torch.int64, device=self.offsets.device)
        return bags.repeat_interleave(self.lengths, output_size=self.total)


def ids_of(given: FeatureInput) -> Tensor:
    """Return the ids int64 of an input that was checked: [n] of jagged ones, any shape of dense ones."""
    return given.values if isinstance(given, Jagged) else given


def bags_of(feature: FeatureConfig, given: FeatureInput) -> Bags | None:
    """Return the bags of an input that was checked: those of a Jagged, or the last dimension; None without pooling."""
    if feature.pooling == "none":
        return None
    mean = feature.pooling == "mean"
    if isinstance(given, Jagged):
        weights = None if given.weights is None else given.weights.contiguous()
        offsets = given.offsets.long().contiguous()
        return Bags(offsets, len(given.values), weights, mean, (len(offsets) - 1,))
    shape, length = given.shape[:-1], given.shape[-1]
    offsets = torch.arange(shape.numel() + 1, dtype=torch.int64, device=given.device) * length
    return Bags(offsets, given.numel(), None, mean, tuple(shape))


def check_input(feature: FeatureConfig, given: object) -> torch.device:
    """Raise ValueError unless a feature can look up what it was given; return where that is."""
    name = feature.name
    if isinstance(given, Jagged):
        _check_jagged(feature, given)
        return given.values.device
    if not isinstance(given, Tensor):
        raise ValueError(f"ids of feature {name!r} must be Jagged or an int64 tensor, got {type(given).__name__}")
    _check_ids(name, given)
    if feature.pooling != "none" and given.ndim == 0:
        raise ValueError(f"feature {name!r} pools over the last dimension, and its ids have none: give [..., n]")
    return given.device


def _check_ids(name: str, ids: Tensor) -> None:
    if ids.dtype != torch.int64:
        raise ValueError(f"ids of feature {name!r} must be int64, got {ids.dtype}: convert with .long()")


def _check_jagged(feature: FeatureConfig, given: Jagged) -> None:
    for field, tensor in given._asdict().items():
        if not isinstance(tensor, Tensor) and (field, tensor) != ("weights", None):
            raise ValueError(f"{field} of feature {feature.name!r} must be a tensor, got {type(tensor).__name__}")
        if tensor is not None and (tensor.ndim != 1 or tensor.device != given.values.device):
            raise ValueError(
                f"{field} of feature {feature.name!r} must be of one dimension on the device of the values,"
                f" {given.values.device}, got shape {list(tensor.shape)} on {tensor.device}"
            )
    _check_ids(feature.name, given.values)
    _check_offsets(feature.name, given.offsets, len(given.values))
    if given.weights is not None:
        _check_weights(feature, given.weights, len(given.values))


def _check_offsets(name: str, offsets: Tensor, count: int) -> None:
    if offsets.dtype not in (torch.int64, torch.int32) or len(offsets) == 0:
        raise ValueError(
            f"offsets of feature {name!r} must be int64 [bags + 1], at least one number, got {offsets.dtype}"
            f" {list(offsets.shape)}"
        )
    ends = offsets.cpu()
    if (shrinks := (ends.diff() < 0).nonzero().flatten()).numel():
        bag = int(shrinks[0])
        raise ValueError(
            f"offsets of feature {name!r} decrease from {int(ends[bag])} to {int(ends[bag + 1])} at bag {bag}:"
            " its length would be negative"
        )
    if int(ends[0]) != 0 or int(ends[-1]) != count:
        raise ValueError(
            f"offsets of feature {name!r} must go from 0 to its {count} values, they go from {int(ends[0])} to"
            f" {int(ends[-1])}"
        )


def _check_weights(feature: FeatureConfig, weights: Tensor, count: int) -> None:
    if feature.pooling != "sum":
        raise ValueError(
            f"weights of feature {feature.name!r} need pooling='sum', its pooling is {feature.pooling!r}: weigh the"
            " rows after the lookup, or normalise the weights"
        )
    if weights.dtype != torch.float32 or len(weights) != count:
        raise ValueError(
            f"weights of feature {feature.name!r} must be float32 [{count}], one per value, got {weights.dtype}"
            f" {list(weights.shape)}"
        )
    if not weights.detach().isfinite().all():
        raise ValueError(f"weights of feature {feature.name!r} are not all finite")
