"""The device backend: tables in GPU memory, kernels in Triton. README.md has the layout, the costs and the limits."""

from collections.abc import Sequence

import torch
from grzoo.embeddings.kernels.base import Backend, BackendUnavailable, RowInit, TableStorage, Unique
from torch import Tensor

__all__ = ["TritonBackend", "load"]

_NORM_ELEMENTS = 1 << 24


class TritonBackend(Backend):
    """Tables on the current CUDA or HIP device, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1)."""

    @property
    def name(self) -> str:
        return "triton"

    @property
    def device(self) -> torch.device:
        from .launch import default_device

        device = default_device()
        assert device is not None
        return device

    def create(self, dim: int, inits: Sequence[RowInit], rounding: str | None = None) -> TableStorage:
        from .storage import TritonStorage

        return TritonStorage(dim, inits, rounding)

    def unique(self, ids: Tensor, tables: Tensor | None = None) -> Unique:
        from .functions import unique

        return unique(ids, tables)

    def squared_norm(self, values: Tensor) -> Tensor:
        # A GPU makes a copy in float64 first: of a part at a time.
        parts = values.flatten().split(_NORM_ELEMENTS)
        return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts]).sum()

    def segment_sum(self, values: Tensor, index: Tensor, num_segments: int, out: Tensor | None = None) -> Tensor:
        from .functions import segment_sum

        return segment_sum(values, index, num_segments, out)

    def pool_rows(self, values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        from .functions import sum_runs

        if weights is not None:
            return super().pool_rows(values, index, offsets, weights)
        return sum_runs(values, index, offsets)


def load() -> Backend:
    """Return the backend; BackendUnavailable says why it cannot run here."""
    try:
        from .launch import default_device
    except ImportError as error:
        raise BackendUnavailable(f"the device backend needs triton >= 3.6: {error}") from error
    if default_device() is None:
        raise BackendUnavailable(
            "tables with placement='device' need a CUDA or HIP device (or TRITON_INTERPRET=1, for tests): here give"
            " them placement='host'"
        )
    return TritonBackend()
