"""Backends of dynamic tables, chosen by `get_backend`.

`naive` (plain PyTorch, the ground truth) and `host` (C++) keep tables in host memory, `triton` in that of a GPU.
"""

import functools
import importlib
import importlib.util
import logging

from .base import STEP_SLOT, Backend, BackendUnavailable, RowInit, Slot, TableStorage, Unique

__all__ = [
    "BACKENDS",
    "STEP_SLOT",
    "Backend",
    "BackendUnavailable",
    "RowInit",
    "Slot",
    "TableStorage",
    "Unique",
    "get_backend",
]

logger = logging.getLogger(__name__)

BACKENDS = {  # name -> module with a `load()`
    "host": "grzoo.embeddings.kernels.host",
    "naive": "grzoo.embeddings.kernels.naive",
    "triton": "grzoo.embeddings.kernels.triton",
}
_AUTO = ("host", "naive")  # "auto" takes the first that runs here


def get_backend(name: str = "auto") -> Backend:
    """Return the backend called `name`; "auto" is the fastest for host memory that runs here, named once in the log.

    Raises ValueError for an unknown name and BackendUnavailable when a backend that was asked for cannot run.
    """
    if name == "auto":
        return _choose()
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: use 'auto' or one of {sorted(BACKENDS)}")
    return _load(name)


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
