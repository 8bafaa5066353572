"""Dynamic tables in plain PyTorch and a Python dict: the ground truth of every other backend, and the fallback."""

from collections.abc import Mapping, Sequence

import torch
from grzoo.embeddings.policies import initial_rows
from torch import Tensor

from .base import MAX_STEP, ROUNDINGS, STEP_SLOT, Backend, RowInit, Slot, TableStorage, Unique
from .rounding import round_stochastic
from .rules import RULES, check_hyper

_FIRST_CAPACITY = 64


class NaiveStorage(TableStorage):
    """A handle is a row number of tensors that double when full; freed rows are used again, last freed first."""

    def __init__(self, dim: int, inits: Sequence[RowInit], rounding: str | None = None) -> None:
        assert rounding is None or rounding in ROUNDINGS
        self._dim = dim
        self._rounding = rounding
        self._inits = list(inits)
        self._index: list[dict[int, int]] | None = [{} for _ in inits]  # id -> handle; None once closed
        self._free: list[int] = []
        self._layout: dict[str, Slot] = {}
        self._rows = torch.zeros(0, dim, dtype=torch.bfloat16 if rounding else torch.float32, device="cpu")
        self._slots = {STEP_SLOT: torch.zeros(0, 1, dtype=torch.int32, device="cpu")}

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def _open_index(self) -> list[dict[int, int]]:
        if self._index is None:
            raise RuntimeError("this embedding table was closed")
        return self._index

    def set_slots(self, slots: Sequence[Slot]) -> None:
        assert self._open_index is not None
        for slot in slots:
            if slot.width not in (1, self._dim) or slot.name == STEP_SLOT:
                raise ValueError(f"{slot} must have width 1 or {self._dim} and a name other than {STEP_SLOT!r}")
        state = {STEP_SLOT: self._slots[STEP_SLOT]}
        for slot in slots:
            old = self._slots.get(slot.name)
            if old is None or old.shape[1] != slot.width:
                old = torch.full((len(self._rows), slot.width), slot.fill, dtype=torch.float32, device="cpu")
            state[slot.name] = old
        self._slots, self._layout = state, {slot.name: slot for slot in slots}

    def find(self, tables: Tensor, ids: Tensor) -> Tensor:
        index = self._open_index
        found = [index[t].get(i, -1) for t, i in zip(tables.tolist(), ids.tolist(), strict=True)]
        return torch.tensor(found, dtype=torch.int64, device="cpu")

    def find_or_insert(self, tables: Tensor, ids: Tensor) -> tuple[Tensor, int]:
        handles = self.find(tables, ids)
        missing = (handles < 0).nonzero().flatten()
        if len(missing) == 0:
            return handles, 0
        new = self._allocate(len(missing))
        handles[missing] = new
        for t, i, handle in zip(tables[missing].tolist(), ids[missing].tolist(), new.tolist(), strict=True):
            assert i not in self._open_index[t], "ids must be distinct within a call"
            self._open_index[t][i] = handle
        self._fill(new, tables[missing], ids[missing])
        return handles, len(missing)

    def _allocate(self, count: int) -> Tensor:
        reused = [self._free.pop() for _ in range(min(count, len(self._free)))]
        used = len(self) + len(self._free) + len(reused)  # rows in use or free; the new ones are not in the index yet
        fresh = range(used, used + count - len(reused))
        self._reserve(fresh.stop)
        return torch.tensor([*reused, *fresh], dtype=torch.int64, device="cpu")

    def _reserve(self, rows: int) -> None:
        capacity = len(self._rows)
        if rows <= capacity:
            return
        extra = max(rows, 2 * capacity, _FIRST_CAPACITY) - capacity
        self._rows = torch.cat([self._rows, self._rows.new_zeros(extra, self._dim)])
        self._slots = {name: torch.cat([s, s.new_zeros(extra, s.shape[1])]) for name, s in self._slots.items()}

    def _fill(self, handles: Tensor, tables: Tensor, ids: Tensor) -> None:
        for t, init in enumerate(self._inits):
            mine = tables == t
            self._rows[handles[mine]] = initial_rows(init, ids[mine], self._dim).to(self._rows.dtype)
        for name, values in self._slots.items():
            values[handles] = self._layout[name].fill if name in self._layout else 0

    def gather(self, handles: Tensor, out: Tensor | None = None) -> Tensor:
        assert self._open_index is not None
        known = handles >= 0
        if len(self._rows) == 0:
            assert not known.any(), "handle of another table"
            rows = torch.zeros(len(handles), self._dim, dtype=torch.float32, device="cpu")
        else:
            rows = self._rows.index_select(0, handles.clamp(min=0)).float().mul_(known[:, None])
        return rows if out is None else out.copy_(rows)

    def gather_slot(self, name: str, handles: Tensor, out: Tensor | None = None) -> Tensor:
        assert self._open_index is not None
        values = self._slots[name].index_select(0, handles)
        return values if out is None else out.copy_(values)

    def scatter(self, handles: Tensor, rows: Tensor | None, slots: Mapping[str, Tensor]) -> None:
        assert self._open_index is not None
        if rows is not None:
            self._rows.index_copy_(0, handles, rows.to(self._rows.dtype))
        for name, values in slots.items():
            self._slots[name].index_copy_(0, handles, values)

    def erase(self, tables: Tensor, ids: Tensor) -> int:
        index = self._open_index
        pairs = zip(tables.tolist(), ids.tolist(), strict=True)
        freed = [index[t].pop(i) for t, i in pairs if i in index[t]]
        self._free.extend(freed)
        return len(freed)

    def update(self, rule: str, handles: Tensor, grads: Tensor, keys: Tensor | None = None, **hyper: float) -> None:
        assert self._open_index is not None
        check_hyper(rule, hyper)
        rows = self._rows.index_select(0, handles).float()
        slots = {name: values.index_select(0, handles) for name, values in self._slots.items()}
        steps = slots[STEP_SLOT]
        steps += steps < MAX_STEP
        RULES[rule].apply(rows, grads, slots, steps.long(), **hyper)
        if self._rounding == "stochastic":
            assert keys is not None
            rows = round_stochastic(rows, keys, steps.flatten().long())
        self.scatter(handles, rows, slots)

    def keys(self) -> tuple[Tensor, Tensor, Tensor]:
        index = self._open_index
        tables = [t for t, ids in enumerate(index) for _ in ids]
        ids = [i for table in index for i in table]
        handles = [h for table in index for h in table.values()]
        return (
            torch.tensor(tables, dtype=torch.int32, device="cpu"),
            torch.tensor(ids, dtype=torch.int64, device="cpu"),
            torch.tensor(handles, dtype=torch.int64, device="cpu"),
        )

    def __len__(self) -> int:
        return sum(len(ids) for ids in self._open_index)

    def memory_bytes(self) -> int:
        index_bytes = sum(ids.__sizeof__() + 64 * len(ids) for ids in self._open_index)  # two int objects of 32 bytes
        return index_bytes + sum(t.nbytes for t in (self._rows, *self._slots.values()))

    def close(self) -> None:
        self._index = None
        self._rows, self._slots = self._rows[:0].clone(), {}


class NaiveBackend(Backend):
    """See `Backend`; every function here is its definition."""

    @property
    def name(self) -> str:
        return "naive"

    def create(self, dim: int, inits: Sequence[RowInit], rounding: str | None = None) -> TableStorage:
        return NaiveStorage(dim, inits, rounding)

    def unique(self, ids: Tensor, tables: Tensor | None = None) -> Unique:
        order = torch.argsort(ids, stable=True)
        starts = torch.ones(len(ids), dtype=torch.bool, device="cpu")  # in sorted order: does a new pair begin here?
        starts[1:] = ids[order][1:] != ids[order][:-1]
        if tables is not None:
            order = order[torch.argsort(tables[order], stable=True)]
            ids_sorted, tables_sorted = ids[order], tables[order]
            starts[1:] = (ids_sorted[1:] != ids_sorted[:-1]) | (tables_sorted[1:] != tables_sorted[:-1])
        group = torch.cumsum(starts, 0) - 1
        first = order[starts]  # stable sorts: the first occurrence of each pair
        seen = torch.argsort(first)  # groups in the order of their first occurrence
        rank = torch.empty_like(seen)
        rank[seen] = torch.arange(len(seen), device="cpu")
        inverse = torch.empty_like(order)
        inverse[order] = rank[group]
        first = first[seen]
        counts = torch.bincount(inverse, minlength=len(first))
        return Unique(ids[first], None if tables is None else tables[first], inverse, counts)

    def segment_sum(self, values: Tensor, index: Tensor, num_segments: int, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.zeros(num_segments, values.shape[1], dtype=torch.float32, device=values.device)
        if values.device.type != "cpu":
            return out.index_put_((index,), values, accumulate=True)  # sorts: deterministic on a GPU
        return out.index_add_(0, index, values)  # on the CPU: one after the other, in the order of `index`


def load() -> Backend:
    """Return the backend."""
    return NaiveBackend()
