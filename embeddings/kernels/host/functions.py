"""Distinct ids and sums by segment in C++."""

from ctypes import byref, c_double, c_int64

import torch
from grzoo.embeddings.kernels.base import Unique
from torch import Tensor

from .buffers import empty_rows
from .library import call, num_threads, pointer


def unique(ids: Tensor, tables: Tensor | None = None) -> Unique:
    """See `Backend.unique`."""
    n, found = len(ids), c_int64()
    source = pointer(ids, torch.int64, n, name="ids")
    source_tables = pointer(tables, torch.int32, n, name="tables")
    unique_ids, inverse, counts = torch.empty(3, n, dtype=torch.int64, device="cpu").unbind()
    unique_tables = None if tables is None else torch.empty_like(tables)
    target_tables = None if unique_tables is None else unique_tables.data_ptr()
    targets = (target_tables, unique_ids.data_ptr(), inverse.data_ptr(), counts.data_ptr())
    call("unique", source_tables, source, n, *targets, byref(found), num_threads())
    u = found.value
    return Unique(unique_ids[:u], None if unique_tables is None else unique_tables[:u], inverse, counts[:u])


def segment_sum(values: Tensor, index: Tensor, num_segments: int, out: Tensor | None = None) -> Tensor:
    """See `Backend.segment_sum`."""
    n, dim = values.shape
    accumulate = out is not None
    if out is None:
        out = empty_rows(num_segments, dim)
    source = pointer(values, torch.float32, n, dim, name="values")
    segments = pointer(index, torch.int64, n, name="index")
    target = pointer(out, torch.float32, num_segments, dim, name="out")
    call("segment_sum", source, segments, n, dim, num_segments, target, int(accumulate), num_threads())
    return out


def squared_norm(values: Tensor) -> float:
    """See `Backend.squared_norm`."""
    n, dim = values.shape
    result = c_double()
    call("squared_norm", pointer(values, torch.float32, n, dim, name="values"), n, dim, byref(result), num_threads())
    return result.value


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Return values[index] float32 [n, dim] of values float32 [rows, dim], index int64 [n], written past the caches."""
    rows, dim = values.shape
    n = len(index)
    out = empty_rows(n, dim)
    source = pointer(values, torch.float32, rows, dim, name="values")
    call("take_rows", source, rows, pointer(index, torch.int64, n, name="index"), n, dim, out.data_ptr(), num_threads())
    return out


def pool_rows(values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """See `Backend.pool_rows`: no row but the sums is written."""
    (rows, dim), n, bags = values.shape, len(index), len(offsets) - 1
    out = torch.empty(bags, dim, dtype=torch.float32, device="cpu")
    source = pointer(values, torch.float32, rows, dim, name="values")
    bag = _bags(index, offsets, weights)
    call("pool_rows", source, rows, bag[0], n, bag[1], bags, bag[2], dim, out.data_ptr(), num_threads())
    return out


def unpool_rows(grads: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None, out: Tensor) -> Tensor:
    """See `Backend.unpool_rows`."""
    (bags, dim), n, rows = grads.shape, len(index), len(out)
    source = pointer(grads, torch.float32, len(offsets) - 1, dim, name="grads")
    target = pointer(out, torch.float32, rows, dim, name="out")
    bag = _bags(index, offsets, weights)
    call("unpool_rows", source, bag[0], n, bag[1], bags, bag[2], rows, dim, target, num_threads())
    return out


def _bags(index: Tensor, offsets: Tensor, weights: Tensor | None) -> tuple[int | None, int | None, int | None]:
    n = len(index)
    return (
        pointer(index, torch.int64, n, name="index"),
        pointer(offsets, torch.int64, len(offsets), name="offsets"),
        pointer(weights, torch.float32, n, name="weights"),
    )
