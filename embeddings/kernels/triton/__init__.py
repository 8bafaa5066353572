"""The device backend: tables in GPU memory, kernels in Triton. README.md has the layout, the costs and the limits."""

from collections.abc import Sequence

from grzoo.embeddings.kernels.base import Backend, BackendUnavailable, RowInit, TableStorage, Unique
from torch import Tensor

__all__ = ["TritonBackend", "load"]


class TritonBackend(Backend):
    """Tables on the current CUDA or HIP device, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1)."""

    @property
    def name(self) -> str:
        return "triton"

    def create(self, dim: int, inits: Sequence[RowInit], rounding: str | None = None) -> TableStorage:
        from .storage import TritonStorage

        return TritonStorage(dim, inits, rounding)

    def unique(self, ids: Tensor, tables: Tensor | None = None) -> Unique:
        from .functions import unique

        return unique(ids, tables) if _runs_on(ids) else _on_the_cpu().unique(ids, tables)

    def segment_sum(self, values: Tensor, index: Tensor, num_segments: int, out: Tensor | None = None) -> Tensor:
        from .functions import segment_sum

        compute = segment_sum if _runs_on(values) else _on_the_cpu().segment_sum
        return compute(values, index, num_segments, out)


def _runs_on(tensor: Tensor) -> bool:
    from .launch import runs_on

    return runs_on(tensor)


def _on_the_cpu() -> Backend:
    """The backend of tensors that are in host memory."""
    from grzoo.embeddings.kernels import get_backend

    return get_backend("auto")


def load() -> Backend:
    """Return the backend; BackendUnavailable says why it cannot run here."""
    try:
        from .launch import default_device
    except ImportError as error:
        raise BackendUnavailable(f"the device backend needs triton >= 3.6: {error}") from error
    if default_device() is None:
        raise BackendUnavailable("the device backend needs a CUDA or HIP device (or TRITON_INTERPRET=1, for tests)")
    return TritonBackend()
