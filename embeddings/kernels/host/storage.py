"""Dynamic tables in C++."""

import weakref
from collections.abc import Mapping, Sequence
from ctypes import byref, c_float, c_int64, c_void_p

import torch
from grzoo.embeddings.kernels.base import ROUNDINGS, STEP_SLOT, RowInit, Slot, TableStorage
from grzoo.embeddings.kernels.rules import RULES, check_hyper, slots_of
from torch import Tensor

from .buffers import empty_rows
from .library import Hyper, call, library, num_threads, pointer

_KINDS = {"constant": 0, "uniform": 1, "quantile": 2}  # as in src/grzoo_host.h
_RULE_NUMBER = {name: number for number, name in enumerate(RULES)}  # as in src/grzoo_host.h
_CLOSED = "this embedding table was closed"


class HostStorage(TableStorage):
    """A handle is a row number; rows with their state lie in chunks of a few megabytes that never move.

    Results do not depend on the number of threads. Calls from several threads wait for each other, `close` too.
    `MemoryError` is raised, with the table unchanged, before growth takes what the machine needs to live.
    """

    def __init__(self, dim: int, inits: Sequence[RowInit], rounding: str | None = None) -> None:
        assert rounding is None or rounding in ROUNDINGS
        self._rounding = rounding
        address = c_void_p()
        call("storage_new", dim, int(rounding is not None), byref(address))
        self._dim = dim
        self._address, self._closed = address, False
        # Not in `close`: another thread may be in a call. Nor at exit, where such a thread may still run.
        weakref.finalize(self, library().grzoo_storage_free, address).atexit = False
        self._quantiles = [init.quantiles for init in inits]  # the kernels read them for as long as the storage lives
        self._layout: list[Slot] = []
        for table, init in enumerate(inits):
            if init.kind not in _KINDS:
                raise ValueError(f"unknown initial law {init.kind!r}: use one of {sorted(_KINDS)}")
            factor = init.scale * 2.0**-23 if init.kind == "uniform" else init.scale
            quantiles = pointer(init.quantiles, torch.float32, 65536, name="quantiles")
            call("storage_initializer", address, table, _KINDS[init.kind], init.key, factor, quantiles)

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def _open(self) -> c_void_p:
        if self._closed:
            raise RuntimeError(_CLOSED)
        return self._address

    def set_slots(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            if slot.width not in (1, self._dim) or slot.name == STEP_SLOT:
                raise ValueError(f"{slot} must have width 1 or {self._dim} and a name other than {STEP_SLOT!r}")
        present = {(slot.name, slot.width): k for k, slot in enumerate(self._layout)}
        count = len(slots)
        widths = (c_int64 * count)(*(slot.width for slot in slots))
        fills = (c_float * count)(*(slot.fill for slot in slots))
        previous = (c_int64 * count)(*(present.get((slot.name, slot.width), -1) for slot in slots))
        call("storage_set_slots", self._open, count, widths, fills, previous)
        self._layout = list(slots)

    def find(self, tables: Tensor, ids: Tensor) -> Tensor:
        n, handles = len(ids), torch.empty_like(ids)
        call("storage_find", self._open, *self._pairs(tables, ids), n, handles.data_ptr(), num_threads())
        return handles

    def find_or_insert(self, tables: Tensor, ids: Tensor) -> tuple[Tensor, int]:
        n, handles, inserted = len(ids), torch.empty_like(ids), c_int64()
        pairs = self._pairs(tables, ids)
        call("storage_find_or_insert", self._open, *pairs, n, handles.data_ptr(), byref(inserted), num_threads())
        return handles, inserted.value

    def gather(self, handles: Tensor, out: Tensor | None = None) -> Tensor:
        n = len(handles)
        if out is None:
            out = empty_rows(n, self._dim)
        target = pointer(out, torch.float32, n, self._dim, name="out")
        call("storage_gather", self._open, self._handles(handles), n, target, num_threads())
        return out

    def gather_slot(self, name: str, handles: Tensor, out: Tensor | None = None) -> Tensor:
        n, storage, where = len(handles), self._open, self._handles(handles)
        dtype, width = torch.int32, 1
        if name != STEP_SLOT:
            dtype, width = torch.float32, self._layout[self._slot(name)].width
        if out is None:
            out = torch.empty(n, width, dtype=dtype, device="cpu")
        target = pointer(out, dtype, n, width, name="out")
        if name == STEP_SLOT:
            call("storage_gather_step", storage, where, n, target)
        else:
            call("storage_gather_slot", storage, self._slot(name), where, n, target, num_threads())
        return out

    def scatter(self, handles: Tensor, rows: Tensor | None, slots: Mapping[str, Tensor]) -> None:
        storage, n, where = self._open, len(handles), self._handles(handles)
        if rows is not None:
            source = pointer(rows, torch.float32, n, self._dim, name="rows")
            call("storage_scatter", storage, where, n, source, num_threads())
        for name, values in slots.items():
            if name == STEP_SLOT:
                call("storage_scatter_step", storage, where, n, pointer(values, torch.int32, n, 1, name=name))
            else:
                number = self._slot(name)
                source = pointer(values, torch.float32, n, self._layout[number].width, name=name)
                call("storage_scatter_slot", storage, number, where, n, source, num_threads())

    def erase(self, tables: Tensor, ids: Tensor) -> int:
        erased = c_int64()
        call("storage_erase", self._open, *self._pairs(tables, ids), len(ids), byref(erased))
        return erased.value

    def update(self, rule: str, handles: Tensor, grads: Tensor, keys: Tensor | None = None, **hyper: float) -> None:
        storage, n = self._open, len(handles)
        number, slots, values = self._rule(rule, hyper)
        source = pointer(grads, torch.float32, n, self._dim, name="grads")
        of_rows = None
        if self._rounding == "stochastic":
            assert keys is not None
            of_rows = pointer(keys, torch.int64, n, name="keys")
        where, hypers = self._handles(handles), byref(values)
        call("storage_update", storage, number, slots, where, n, source, of_rows, hypers, num_threads())

    def keys(self) -> tuple[Tensor, Tensor, Tensor]:
        n = len(self)
        tables = torch.empty(n, dtype=torch.int32, device="cpu")
        ids, handles = torch.empty(2, n, dtype=torch.int64, device="cpu").unbind()
        call("storage_keys", self._open, tables.data_ptr(), ids.data_ptr(), handles.data_ptr())
        return tables, ids, handles

    def sorted_keys(self, table: int) -> tuple[Tensor, Tensor]:
        # Room for all logical tables: pages that are not written to take no memory.
        (ids, handles), count = torch.empty(2, len(self), dtype=torch.int64, device="cpu").unbind(), c_int64()
        call("storage_sorted_keys", self._open, table, ids.data_ptr(), handles.data_ptr(), byref(count))
        return ids[: count.value], handles[: count.value]

    def reserve(self, rows: int) -> None:
        call("storage_reserve", self._open, rows)

    def insert_blank(self, tables: Tensor, ids: Tensor) -> Tensor:
        n, handles = len(ids), torch.empty_like(ids)
        call("storage_insert_blank", self._open, *self._pairs(tables, ids), n, handles.data_ptr(), num_threads())
        return handles

    def write(self, tables: Tensor, ids: Tensor, rows: Tensor, slots: Mapping[str, Tensor]) -> None:
        n, storage = len(ids), self._open
        source, steps = (
            pointer(rows, torch.float32, n, self._dim, name="rows"),
            pointer(slots[STEP_SLOT], torch.int32, n, 1, name=STEP_SLOT),
        )
        state = [pointer(slots[s.name], torch.float32, n, s.width, name=s.name) for s in self._layout]
        pointers = (c_void_p * len(state))(*state)
        call("storage_write", storage, *self._pairs(tables, ids), n, source, pointers, steps, num_threads())

    def __len__(self) -> int:
        return self._number("storage_size")

    def memory_bytes(self) -> int:
        return self._number("storage_bytes")

    def close(self) -> None:
        self._closed = True
        library().grzoo_storage_close(self._address)  # waits for calls of other threads that have begun

    def _number(self, name: str) -> int:
        number = int(getattr(library(), f"grzoo_{name}")(self._open))
        if number < 0:  # closed since
            raise RuntimeError(_CLOSED)
        return number

    def _pairs(self, tables: Tensor, ids: Tensor) -> tuple[int | None, int | None]:
        n = len(ids)
        return pointer(tables, torch.int32, n, name="tables"), pointer(ids, torch.int64, n, name="ids")

    def _handles(self, handles: Tensor) -> int | None:
        return pointer(handles, torch.int64, len(handles), name="handles")

    def _slot(self, name: str) -> int:
        for number, slot in enumerate(self._layout):
            if slot.name == name:
                return number
        raise KeyError(name)

    def _rule(self, rule: str, hyper: dict[str, float]) -> tuple[int, object, Hyper]:
        check_hyper(rule, hyper)
        slots = (c_int64 * 2)(*(self._slot(name) for name in slots_of(rule, hyper)))
        return _RULE_NUMBER[rule], slots, Hyper(**hyper)
