"""The host backend: tables in C++, compiled on first use with the system's compiler.

Environment: `GRZOO_CACHE` (folder of compiled libraries), `CXX` (compiler), `GRZOO_NUM_THREADS` (default: torch's),
`GRZOO_MEMORY_LIMIT` (bytes that all tables of a process may take; default: what the machine has left).
"""

from collections.abc import Sequence

from grzoo.embeddings.kernels.base import Backend, RowInit, TableStorage, Unique
from torch import Tensor

from .functions import pool_rows, segment_sum, squared_norm, take_rows, unique, unpool_rows
from .library import library
from .storage import HostStorage

__all__ = ["HostBackend", "HostStorage", "load", "segment_sum", "squared_norm", "take_rows", "unique"]


class HostBackend(Backend):
    """Tables and kernels in C++."""

    @property
    def name(self) -> str:
        return "host"

    def create(self, dim: int, inits: Sequence[RowInit], rounding: str | None = None) -> TableStorage:
        return HostStorage(dim, inits, rounding)

    def unique(self, ids: Tensor, tables: Tensor | None = None) -> Unique:
        return unique(ids, tables)

    def squared_norm(self, values: Tensor) -> float:
        return squared_norm(values)

    def take_rows(self, values: Tensor, index: Tensor) -> Tensor:
        return take_rows(values, index)

    def pool_rows(self, values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        return pool_rows(values, index, offsets, weights)

    def unpool_rows(
        self, grads: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None, out: Tensor
    ) -> Tensor:  # fmt: skip
        return unpool_rows(grads, index, offsets, weights, out)

    def segment_sum(self, values: Tensor, index: Tensor, num_segments: int, out: Tensor | None = None) -> Tensor:
        return segment_sum(values, index, num_segments, out)


def load() -> Backend:
    """Return the backend, compiling it first where it was not; BackendUnavailable says why it cannot run."""
    library()
    return HostBackend()
