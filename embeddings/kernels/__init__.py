"""Backends of dynamic tables, chosen by `get_backend`.

`naive` (plain PyTorch, the ground truth) and `host` (C++) keep tables in host memory, `triton` in that of a GPU.
"""

import functools
import importlib
import importlib.util
import logging

import torch

from .base import STEP_SLOT, Backend, BackendUnavailable, HasInitialRows, RowInit, Slot, TableStorage, Unique

__all__ = [
    "BACKENDS",
    "PLACEMENTS",
    "STEP_SLOT",
    "Backend",
    "BackendUnavailable",
    "HasInitialRows",
    "RowInit",
    "Slot",
    "TableStorage",
    "Unique",
    "check_backend",
    "functions_at",
    "get_backend",
    "placed_backend",
]

logger = logging.getLogger(__name__)

BACKENDS = {  # name -> module with a `load()`
    "host": "grzoo.embeddings.kernels.host",
    "naive": "grzoo.embeddings.kernels.naive",
    "triton": "grzoo.embeddings.kernels.triton",
}
PLACEMENTS = ("host", "device")  # where tables are: in host memory, or in that of a GPU
_AUTO = ("host", "naive")  # "auto" takes the first that runs here
_DEVICE = "triton"


def get_backend(name: str = "auto") -> Backend:
    """Return the backend called `name`; "auto" is the fastest for host memory that runs here, named once in the log.

    Raises ValueError for an unknown name and BackendUnavailable when a backend that was asked for cannot run.
    """
    if name == "auto":
        return _choose()
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: use 'auto' or one of {sorted(BACKENDS)}")
    return _load(name)


def placed_backend(placement: str, name: str) -> Backend:
    """Return the backend of tables of a placement; `name` ("auto", "host", "naive") says which one in host memory.

    Raises BackendUnavailable as `get_backend`.
    """
    assert placement in PLACEMENTS
    return get_backend(_DEVICE if placement == "device" else name)


def check_backend(name: str) -> None:
    """Raise ValueError unless `name` is that of a backend for tables in host memory, or "auto"."""
    if name == _DEVICE:
        raise ValueError(f"backend {name!r} is that of tables on a device: give them TableConfig(placement='device')")
    if name not in ("auto", *_AUTO):
        raise ValueError(f"unknown backend {name!r}: use 'auto' or one of {sorted(_AUTO)}")


def functions_at(device: torch.device, backend: Backend) -> Backend:
    """Return the backend whose functions take tensors on a device: `backend`, where that is the place of its tables."""
    if device.type == backend.device.type:
        return backend
    if device.type == "cpu":
        return get_backend("auto")
    try:
        return get_backend(_DEVICE)
    except BackendUnavailable:
        return get_backend("naive")  # plain torch, on any device


@functools.cache
def _load(name: str) -> Backend:
    """Import the module of a backend and call its `load()`, which returns the Backend or raises BackendUnavailable."""
    spec = importlib.util.find_spec(BACKENDS[name])
    if spec is None or spec.origin is None:  # absent, or a bare folder
        raise BackendUnavailable(f"this installation has no backend {name!r}")
    backend: Backend = importlib.import_module(BACKENDS[name]).load()
    return backend


@functools.cache
def _choose() -> Backend:
    for name in _AUTO:
        try:
            backend = _load(name)
        except BackendUnavailable as reason:
            logger.warning("embedding tables: backend %r is not available: %s", name, reason)
        else:
            logger.info("embedding tables: using backend %r", name)
            return backend
    raise AssertionError("the naive backend is always available")
