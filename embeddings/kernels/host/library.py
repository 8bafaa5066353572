"""The C interface of the host kernels (`src/grzoo_host.h`) through ctypes."""

import ctypes
import functools
import os
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from typing import NoReturn

import torch
from grzoo.embeddings.kernels.base import BackendUnavailable
from torch import Tensor

from .build import library_path


class Hyper(ctypes.Structure):
    """The hyperparameters of all update rules (`GrzooHyper`)."""

    _fields_ = [(name, c_double) for name in ("lr", "momentum", "beta1", "beta2", "eps", "weight_decay", "step")]


_COUNT = POINTER(c_int64)
_HYPER = POINTER(Hyper)
_PROTOTYPES: dict[str, tuple[type | None, list[type]]] = {
    "error": (c_char_p, []),
    "isa": (c_char_p, []),
    "set_isa": (c_int, [c_char_p]),
    "set_memory_limit": (None, [c_int64]),
    "mapped_bytes": (c_int64, []),
    "use_huge_pages": (None, [c_void_p, c_int64]),
    "unique": (c_int, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, _COUNT, c_int]),
    "segment_sum": (c_int, [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int, c_int]),
    "squared_norm": (c_int, [c_void_p, c_int64, c_int64, POINTER(c_double), c_int]),
    "take_rows": (c_int, [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int]),
    "pool_rows": (c_int, [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int]),
    "unpool_rows": (
        c_int,
        [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int],
    ),
    "storage_new": (c_int, [c_int64, c_int, POINTER(c_void_p)]),
    "storage_close": (None, [c_void_p]),
    "storage_free": (None, [c_void_p]),
    "storage_initializer": (c_int, [c_void_p, c_int32, c_int, c_int64, c_float, c_void_p]),
    "storage_set_slots": (c_int, [c_void_p, c_int64, _COUNT, POINTER(c_float), _COUNT]),
    "storage_find": (c_int, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int]),
    "storage_find_or_insert": (c_int, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, _COUNT, c_int]),
    "storage_gather": (c_int, [c_void_p, c_void_p, c_int64, c_void_p, c_int]),
    "storage_gather_slot": (c_int, [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int]),
    "storage_scatter": (c_int, [c_void_p, c_void_p, c_int64, c_void_p, c_int]),
    "storage_scatter_slot": (c_int, [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int]),
    "storage_gather_step": (c_int, [c_void_p, c_void_p, c_int64, c_void_p]),
    "storage_scatter_step": (c_int, [c_void_p, c_void_p, c_int64, c_void_p]),
    "storage_erase": (c_int, [c_void_p, c_void_p, c_void_p, c_int64, _COUNT]),
    "storage_update": (c_int, [c_void_p, c_int, _COUNT, c_void_p, c_int64, c_void_p, c_void_p, _HYPER, c_int]),
    "storage_keys": (c_int, [c_void_p, c_void_p, c_void_p, c_void_p]),
    "storage_sorted_keys": (c_int, [c_void_p, c_int32, c_void_p, c_void_p, _COUNT]),
    "storage_reserve": (c_int, [c_void_p, c_int64]),
    "storage_insert_blank": (c_int, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int]),
    "storage_write": (c_int, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int]),
    "storage_size": (c_int64, [c_void_p]),
    "storage_bytes": (c_int64, [c_void_p]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled library with its functions typed; BackendUnavailable where it cannot be made or loaded."""
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(f"cannot load the compiled kernels ({error}): delete {path}") from error
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(loaded, f"grzoo_{name}")
        function.restype, function.argtypes = result, arguments
    if limit := os.environ.get("GRZOO_MEMORY_LIMIT"):
        loaded.grzoo_set_memory_limit(int(limit))
    return loaded


@functools.cache
def _function(name: str) -> Callable[..., int]:
    function: Callable[..., int] = getattr(library(), f"grzoo_{name}")
    return function


def call(name: str, *arguments: object) -> None:
    """Call a function that returns a status.

    Raises ValueError (bad arguments), MemoryError (the table would outgrow the machine) or RuntimeError.
    """
    status = _function(name)(*arguments)
    if status != 0:
        _raise(status, library().grzoo_error().decode())


def _raise(status: int, message: str) -> NoReturn:
    raise {1: ValueError, 2: MemoryError}.get(status, RuntimeError)(message)


def pointer(tensor: Tensor | None, dtype: torch.dtype, *shape: int, name: str) -> int | None:
    """Return the address of a tensor after checking what the kernels rely on; None (a null pointer) for None."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {dtype} CPU tensor of shape {shape}, not {tensor.dtype} {tuple(tensor.shape)}"
            f" on {tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}"
        )
    return tensor.data_ptr()


def num_threads() -> int:
    """Threads of a kernel: `$GRZOO_NUM_THREADS`, as it was at the first call, else as many as torch uses."""
    return _fixed_threads() or torch.get_num_threads()


@functools.cache
def _fixed_threads() -> int:
    value = os.environ.get("GRZOO_NUM_THREADS") or "0"
    if not value.isdecimal():
        raise ValueError(f"GRZOO_NUM_THREADS={value!r} must be a number of threads, or 0 for as many as torch uses")
    return int(value)
