"""TritonStorage: index, rows and optimizer state of one physical table in GPU memory."""

from collections.abc import Mapping, Sequence

import torch
from grzoo.embeddings.kernels.base import STEP_SLOT, BackendUnavailable, RowInit, Slot, TableStorage
from torch import Tensor

from . import halves, row_kernels, updates
from .chunks import Chunks, shape_of
from .halves import HalfChunks
from .index import KeyIndex
from .launch import blocks, default_device, on
from .laws import Laws

# At least what torch's allocator does not cut out of shared segments of 20 MiB, in which it would leave gaps.
_CHUNK_BYTES = 10 << 20
_MIN_SHIFT = 8


def _shift(words: int) -> int:
    """Rows of a chunk as a power of two: the fewest that fill 10 MiB, at least 256."""
    return max(_MIN_SHIFT, (-(-_CHUNK_BYTES // (4 * words)) - 1).bit_length())


class TritonStorage(TableStorage):
    """A handle is a row number; rows and each slot lie in chunks of their own, which never move.

    Arguments may be on any device and results come back to it; without a copy when it is the table's. Launches per
    call are bounded. The host waits for the device in `find_or_insert` (how many ids are new), `erase`, `keys`, and
    when chunks are added. Tables are not checked to be in range: that would be one more wait.
    """

    def __init__(
        self,
        dim: int,
        inits: Sequence[RowInit],
        rounding: str | None = None,
        device: torch.device | None = None,
        shift: int | None = None,
    ) -> None:
        device = device or default_device()
        if device is None:
            raise BackendUnavailable("tables on the device need a GPU (or TRITON_INTERPRET=1 for tests)")
        if dim <= 0:
            raise ValueError(f"dim must be positive, got {dim}")
        self._dim = dim
        self._device = device
        self._shift = _shift((dim + 1) // 2 if rounding else dim) if shift is None else shift
        self._laws = Laws(inits, device)
        self._index: KeyIndex | None = KeyIndex(device)  # None once closed
        self._layout: dict[str, Slot] = {}
        self._rounding = rounding
        self._rows = HalfChunks(dim, self._shift, device) if rounding else self._chunks(dim)
        self._slots = {STEP_SLOT: self._chunks(1, torch.int32)}

    def _chunks(self, width: int, dtype: torch.dtype = torch.float32) -> Chunks:
        return Chunks(width, self._shift, dtype, self._device)

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def _open(self) -> KeyIndex:
        if self._index is None:
            raise RuntimeError("this embedding table was closed")
        return self._index

    def set_slots(self, slots: Sequence[Slot]) -> None:
        index = self._open
        for slot in slots:
            if slot.width not in (1, self._dim) or slot.name == STEP_SLOT:
                raise ValueError(f"{slot} must have width 1 or {self._dim} and a name other than {STEP_SLOT!r}")
        state = {STEP_SLOT: self._slots[STEP_SLOT]}
        handles = index.keys()[2] if len(index) else None
        for slot in slots:
            old = self._slots.get(slot.name)
            if old is None or old.width != slot.width:
                old = self._chunks(slot.width)
                old.append(old.new_chunks(self._rows.capacity))
                if handles is not None:
                    old.fill(handles, slot.fill)
            state[slot.name] = old
        self._slots, self._layout = state, {slot.name: slot for slot in slots}

    def find(self, tables: Tensor, ids: Tensor) -> Tensor:
        return self._open.find(*self._pairs(tables, ids)).to(ids.device)

    def find_or_insert(self, tables: Tensor, ids: Tensor) -> tuple[Tensor, int]:
        index = self._open
        on_device = self._pairs(tables, ids)
        handles = index.find(*on_device)
        missing = (handles < 0).nonzero().flatten()  # waits for the device: how many are new
        if len(missing):
            self._reserve(len(missing))
            new = index.insert(*on_device, missing, handles)
            self._initialize(new, *on_device, missing)
        return handles.to(ids.device), len(missing)

    def _reserve(self, count: int) -> None:
        """Make room for rows; an allocation that fails leaves the table as it was."""
        index = self._open
        rows = index.used + max(0, count - index.num_free)
        arrays = [self._rows, *self._slots.values()]
        chunks = [array.new_chunks(rows) for array in arrays]
        index.reserve(count)
        for array, new in zip(arrays, chunks, strict=True):
            array.append(new)

    def _initialize(self, new: Tensor, tables: Tensor, ids: Tensor, positions: Tensor) -> None:
        if isinstance(self._rows, HalfChunks):
            absent = torch.full_like(new, -1)
            self._rows.scatter(new, self._rows_or_initial(absent, tables[positions], ids[positions]))
        else:
            shape, n = self._rows.shape, len(new)
            args = self._rows.pointers, new, *self._laws.tensors, tables, ids, positions, n
            with on(self._device):
                row_kernels.initialize_kernel[blocks(n, shape["ROWS"])](*args, **shape)
        for name, array in self._slots.items():
            array.fill(new, self._layout[name].fill if name in self._layout else 0.0)

    def gather(self, handles: Tensor, out: Tensor | None = None) -> Tensor:
        assert self._open is not None
        if out is None:
            return self._rows.gather(self._here(handles)).to(handles.device)
        if out.device == self._device and out.is_contiguous():
            return self._rows.gather(self._here(handles), out)
        return out.copy_(self._rows.gather(self._here(handles)))

    def gather_or_initial(self, handles: Tensor, tables: Tensor, ids: Tensor) -> Tensor:
        """Return rows float32 [n, dim]; where the handle is -1, the initial value of the pair."""
        assert self._open is not None
        here, pairs = self._here(handles), self._pairs(tables, ids)
        if isinstance(self._rows, HalfChunks):
            fresh = self._rows_or_initial(torch.full_like(here, -1), *pairs).to(torch.bfloat16).float()
            rows = torch.where((here < 0)[:, None], fresh, self._rows.gather(here))
        else:
            rows = self._rows_or_initial(here, *pairs)
        return rows.to(handles.device)

    def _rows_or_initial(self, handles: Tensor, tables: Tensor, ids: Tensor) -> Tensor:
        """float32 rows, or initial values where the handle is -1."""
        n, shape = len(handles), shape_of(self._dim, self._shift)
        out = torch.empty(n, self._dim, dtype=torch.float32, device=self._device)
        if n:
            args = self._rows.pointers, handles, *self._laws.tensors, tables, ids, out, n
            with on(self._device):
                row_kernels.gather_initial_kernel[blocks(n, shape["ROWS"])](*args, **shape)
        return out

    def gather_slot(self, name: str, handles: Tensor, out: Tensor | None = None) -> Tensor:
        assert self._open is not None
        values = self._slots[name].gather(self._here(handles))
        return values.to(handles.device) if out is None else out.copy_(values)

    def scatter(self, handles: Tensor, rows: Tensor | None, slots: Mapping[str, Tensor]) -> None:
        assert self._open is not None
        here = self._here(handles)
        if rows is not None:
            self._rows.scatter(here, self._here(rows))
        for name, values in slots.items():
            self._slots[name].scatter(here, self._here(values))

    def erase(self, tables: Tensor, ids: Tensor) -> int:
        return self._open.erase(*self._pairs(tables, ids))

    def update(self, rule: str, handles: Tensor, grads: Tensor, keys: Tensor | None = None, **hyper: float) -> None:
        assert self._open is not None
        here, gradients = self._here(handles), self._here(grads)
        if not isinstance(self._rows, HalfChunks):
            updates.apply(rule, self._rows, self._slots, here, gradients, **hyper)
            return
        of_rows = None
        if self._rounding == "stochastic":
            assert keys is not None
            of_rows = self._here(keys)
        halves.apply(rule, self._rows, self._slots, here, gradients, of_rows, **hyper)

    def keys(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._open.keys()

    def __len__(self) -> int:
        return len(self._open)

    def memory_bytes(self) -> int:
        index_bytes = self._open.nbytes()
        return index_bytes + sum(array.nbytes() for array in (self._rows, *self._slots.values()))

    def close(self) -> None:
        self._index = None
        self._rows, self._slots = self._chunks(self._dim), {}

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device).contiguous()

    def _pairs(self, tables: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        if ids.dtype != torch.int64 or tables.dtype != torch.int32 or tables.shape != ids.shape:
            raise ValueError(
                f"ids must be int64 [n] and tables int32 [n], got {ids.dtype} {list(ids.shape)} and"
                f" {tables.dtype} {list(tables.shape)}"
            )
        return self._here(tables), self._here(ids)
