"""One physical table: the rows of logical tables that were merged because their rows have the same layout."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import TableConfig
from .kernels import STEP_SLOT, Backend, HasInitialRows, RowInit, Slot, TableStorage, placed_backend
from .kernels.base import check_steps
from .kernels.rounding import row_keys, table_keys
from .policies import initial_rows, row_init
from .pretrained import PretrainedRows, load_pretrained
from .shared_rows import SharedRows
from .transfer import HOST, move
from .use import USE_SLOTS, as_slot

SIDE_TABLES = ("candidates", "evicted", "pinned")  # what policies remember of ids: see PhysicalTable.side_table


class PhysicalTable:
    """Index and rows of the logical tables `configs` (of one width), in a storage that is made at first use.

    A logical table is known here by its position in `configs`, which goes beside the id as a second key word: no bit of
    the id is used up by merging.
    """

    def __init__(self, configs: Sequence[TableConfig], *, seed: int, backend: str) -> None:
        self.configs = tuple(configs)
        self.dim = configs[0].embedding_dim
        self.rounding = configs[0].rounding
        self.placement = configs[0].placement
        layout = self.dim, self.rounding, self.placement
        assert all((config.embedding_dim, config.rounding, config.placement) == layout for config in configs)
        self.slots: tuple[Slot, ...] = ()  # of the optimizer
        self.use_slots: tuple[Slot, ...] = USE_SLOTS if any(config.tracks_use for config in configs) else ()
        self.side: dict[str, PhysicalTable] = {}  # those of SIDE_TABLES that were needed so far
        self.dropped = [0] * len(configs)  # entries of each logical table lost for want of room, when this is a log
        self._rows_by_table: Tensor | None = None  # int64 [logical tables]; None: to be counted
        self._seed = seed
        self._backend_name = backend
        self._storage: TableStorage | None = None
        self._is_shared = False  # the storage never changes and may serve copies of this table too
        self._shared: SharedRows | None = None
        self._pretrained_rows: dict[int, PretrainedRows] | None = None  # by logical table; None: not read yet
        self._closed = False

    def empty_like(self) -> "PhysicalTable":
        """Return a table of the same layout without rows."""
        table = PhysicalTable(self.configs, seed=self._seed, backend=self._backend_name)
        table.slots = self.slots
        table._pretrained_rows = self._pretrained_rows
        return table

    def copy(self) -> "PhysicalTable":
        """Return a table with a copy of the rows and their state."""
        table = self.empty_like()
        if self._is_shared and self._storage is not None:
            table.use_storage(self._storage)
        elif len(self):
            tables, ids, handles = self.storage.keys()
            values = self.read(handles)
            table.write(tables, ids, values.pop("rows"), values)
        if self._shared is not None and table.shared is not None:
            table.shared.copy_from(self._shared)
        table.dropped = list(self.dropped)
        table.side = {name: side.copy() for name, side in self.side.items()}
        return table

    def side_table(self, name: str) -> "PhysicalTable":
        """Return the table, made when first asked for, that keeps a last use and a count of (logical table, id) pairs.

        "candidates": ids that wait for admission, with their occurrences; "evicted": ids that were evicted or erased,
        with the step; "pinned": ids that eviction passes over.
        """
        assert name in SIDE_TABLES
        self.check_open()
        if name not in self.side:
            zero = {"kind": "constant", "value": 0.0}
            common: dict[str, Any] = {"initializer": zero, "track_use": True, "placement": self.placement}
            configs = [TableConfig(name=c.name, embedding_dim=1, **common) for c in self.configs]
            self.side[name] = PhysicalTable(configs, seed=0, backend=self._backend_name)
        return self.side[name]

    @functools.cached_property
    def has_policy(self) -> bool:
        """Whether a lookup in some logical table does more than find or insert."""
        return any(config.has_policy for config in self.configs)

    @functools.cached_property
    def is_selective(self) -> bool:
        """Whether some logical table may refuse to insert an id."""
        return any(config.min_count > 1 or config.has_hard_ceiling for config in self.configs)

    @functools.cached_property
    def has_admission(self) -> bool:
        """Whether some logical table admits ids by their count."""
        return any(config.min_count > 1 for config in self.configs)

    @functools.cached_property
    def min_counts(self) -> Tensor:
        """Occurrences from which ids of each logical table are admitted, int64 [logical tables]."""
        return torch.tensor([config.min_count for config in self.configs], dtype=torch.int64, device=self.device)

    @functools.cached_property
    def half_lives(self) -> Tensor | None:
        """Half-life in steps of the counts of each logical table, int64 [logical tables], 0: none; None: all 0."""
        steps = [(config.eviction or {}).get("half_life", 0) for config in self.configs]
        return torch.tensor(steps, dtype=torch.int64, device=self.device) if any(steps) else None

    @property
    def backend(self) -> Backend:
        is_here = self.placement == "host" or self._is_shared  # mapped files are in host memory
        return placed_backend("host" if is_here else "device", self._backend_name)

    @property
    def device(self) -> torch.device:
        """Where index, rows and state are, and what its methods take and return unless they say otherwise."""
        return self.storage.device

    @property
    def storage(self) -> TableStorage:
        """The rows. Raises RuntimeError after `close`."""
        self.check_open()
        if self._storage is None:
            self._storage = self.backend.create(self.dim, self._laws(), self.rounding)
            self._storage.set_slots([*self.slots, *self.use_slots])
        return self._storage

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def check_open(self) -> None:
        """Raise RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError("this embedding table was closed")

    def use_storage(self, storage: TableStorage) -> None:
        """Take the rows of a storage that never changes, into a table that has none; copies share it."""
        assert self._storage is None and storage.dim == self.dim
        self._storage, self._is_shared = storage, True

    @property
    def shared(self) -> SharedRows | None:
        """The rows of logical tables whose unknown ids share one, made at first use; None when no table has it.

        Raises RuntimeError after `close`.
        """
        self.check_open()
        if self._shared is None and any(config.unknown == "shared" for config in self.configs):
            self._shared = SharedRows(self.configs, self._laws("/shared"))
            self._shared.set_slots(self.slots)
        return self._shared

    def _laws(self, suffix: str = "") -> list[RowInit]:
        return [row_init(c.initializer, self._seed, f"{c.init_key}{suffix}") for c in self.configs]

    def row_keys(self, tables: Tensor, ids: Tensor) -> Tensor | None:
        """Return the keys int64 [n] of pairs for the rounding of their updates; None where it needs none."""
        if self.rounding != "stochastic":
            return None
        return row_keys(self._table_keys, tables, ids)

    @functools.cached_property
    def _table_keys(self) -> Tensor:
        return table_keys(self._laws()).to(self.device)

    def _pretrained(self) -> dict[int, PretrainedRows]:
        """The vectors of the logical tables that start from a file, read at first use."""
        if self._pretrained_rows is None:
            self._pretrained_rows = {
                logical: load_pretrained(config.initializer["file"], self.dim, config.name)
                for logical, config in enumerate(self.configs)
                if config.initializer["kind"] == "pretrained"
            }
        return self._pretrained_rows

    @functools.cached_property
    def _has_pretrained(self) -> bool:
        return any(config.initializer["kind"] == "pretrained" for config in self.configs)

    def set_slots(self, slots: Sequence[Slot]) -> None:
        """Set the layout of the optimizer state (see TableStorage.set_slots)."""
        self.check_open()
        if self._storage is not None:
            self._storage.set_slots([*slots, *self.use_slots])
        self.slots = tuple(slots)
        if self._shared is not None:
            self._shared.set_slots(self.slots)

    def __len__(self) -> int:
        return 0 if self._storage is None and not self._closed else len(self.storage)

    def memory_bytes(self) -> int:
        """Bytes that are allocated for index, rows and state, and for what policies remember of ids."""
        own = 0 if self._storage is None and not self._closed else self.storage.memory_bytes()
        shared = 0 if self._shared is None else self._shared.storage.memory_bytes()
        return own + shared + sum(side.memory_bytes() for side in self.side.values())

    def close(self) -> None:
        """Free the rows; use after it raises RuntimeError."""
        if self._storage is not None and not self._is_shared:
            self._storage.close()
        self._storage, self._shared, self._pretrained_rows, self._closed = None, None, None, True
        for side in self.side.values():
            side.close()

    def num_rows(self, logical: int) -> int:
        """Number of rows of one logical table."""
        if len(self.configs) == 1 or len(self) == 0:
            return len(self)
        if self._rows_by_table is None:
            self._rows_by_table = torch.bincount(self.storage.keys()[0], minlength=len(self.configs)).cpu()
        return int(self._rows_by_table[logical])

    def lookup(self, tables: Tensor, ids: Tensor, *, insert: bool) -> tuple[Tensor, int]:
        """Return the handles int64 [n] of distinct pairs (-1: no row) and how many rows were inserted."""
        if not insert:
            return self.storage.find(tables, ids), 0
        self._rows_by_table = None
        if not self._has_pretrained:
            return self.storage.find_or_insert(tables, ids)
        handles = self.storage.find(tables, ids)
        new = handles < 0
        if not new.any():
            return handles, 0
        pretrained = self._pretrained()  # before anything is inserted: it may raise
        handles, inserted = self.storage.find_or_insert(tables, ids)
        for logical, vectors in pretrained.items():
            mine = new & (tables == logical)
            place = vectors.find(ids[mine].cpu())
            self.storage.scatter(handles[mine].cpu()[place >= 0], vectors.rows[place[place >= 0]], {})
        return handles, inserted

    def insert_new(self, tables: Tensor, ids: Tensor) -> Tensor:
        """Return the handles int64 [n] of distinct pairs that had no row. The rows by logical table need no recount."""
        none = torch.zeros(len(self.configs), dtype=torch.int64, device=HOST)
        before = self._rows_by_table if len(self) else none
        handles, inserted = self.lookup(tables, ids, insert=True)
        assert inserted == len(ids)
        if before is not None:
            self._rows_by_table = before + torch.bincount(tables, minlength=len(self.configs)).cpu()
        return handles

    def erase(self, tables: Tensor, ids: Tensor) -> int:
        """Delete rows with their state and return how many there were; absent pairs are ignored."""
        self._rows_by_table = None
        return self.storage.erase(tables, ids)

    def gather(self, tables: Tensor, ids: Tensor, handles: Tensor, out: Tensor | None = None) -> Tensor:
        """Return rows float32 [n, dim], in `out` where that is of use.

        An id without a row (handle -1) gets what its table says of unknown ids.
        """
        rows = self.storage.gather(handles, out)
        if all(config.unknown == "zeros" for config in self.configs):
            return rows
        absent = handles < 0
        if self.device.type == "cpu" and not absent.any():
            return rows
        if any(config.unknown == "initial" for config in self.configs):
            rows = self._with_initial(rows, tables, ids, handles, absent)
        if self.shared is not None:
            shared = self.shared.storage.gather(self.shared.handles(torch.arange(len(self.configs), device=HOST)))
            mine = (absent & self._gives("shared")[tables.long()])[:, None]
            rows = torch.where(mine, move([shared], rows.device)[0][tables.long()], rows)
        return rows

    def _gives(self, unknown: str) -> Tensor:
        """Which logical tables give unknown ids this, bool [logical tables]."""
        flags = torch.tensor([config.unknown == unknown for config in self.configs], dtype=torch.bool, device=HOST)
        return move([flags], self.device)[0]

    def _with_initial(self, rows: Tensor, tables: Tensor, ids: Tensor, handles: Tensor, absent: Tensor) -> Tensor:
        """Rows float32 [n, dim] in which ids without a row have those that they would be born with."""
        mine = absent & self._gives("initial")[tables.long()]
        pretrained = self._pretrained()
        if isinstance(self.storage, HasInitialRows) and not pretrained:
            return torch.where(mine[:, None], self.storage.gather_or_initial(handles, tables, ids), rows)
        place = mine.nonzero().flatten()
        born = torch.zeros(len(place), self.dim, dtype=torch.float32, device=HOST)
        tables, ids = tables[place].cpu(), ids[place].cpu()
        for logical, law in enumerate(self._laws()):
            chosen = (tables == logical).nonzero().flatten()
            born[chosen] = initial_rows(law, ids[chosen], self.dim)
            if logical in pretrained:
                known = pretrained[logical].find(ids[chosen])
                born[chosen[known >= 0]] = pretrained[logical].rows[known[known >= 0]]
        born = born if self.rounding is None else born.to(torch.bfloat16).float()
        return rows.index_copy_(0, place, move([born], rows.device)[0])

    def sorted_keys(self, logical: int) -> tuple[Tensor, Tensor]:
        """Return ids and handles int64 [n] of one logical table, sorted by (bucket, id), in host memory."""
        ids, handles = self.storage.sorted_keys(logical)
        return ids.cpu(), handles.cpu()

    def reserve(self, rows: int) -> None:
        """Make room for so many more rows at once. MemoryError, with nothing changed, where there is none."""
        self.storage.reserve(rows)

    def columns(self, *, state: bool) -> dict[str, tuple[torch.dtype, int]]:
        """Return what a row has in files, beside its id: name -> dtype and width (0: one number, without an axis)."""
        dtype = torch.float32 if self.rounding is None else torch.bfloat16
        columns: dict[str, tuple[torch.dtype, int]] = {"rows": (dtype, self.dim)}
        if state:
            columns |= {slot.name: (torch.float32, slot.width) for slot in self.slots}
            columns |= {slot.name: (torch.int32, 0) for slot in self.use_slots}
            columns[STEP_SLOT] = (torch.int32, 0)
        return columns

    def read_column(self, column: str, handles: Tensor, out: Tensor) -> Tensor:
        """Put one of `columns` of some rows, [n, width] or [n], into `out` in host memory; return that.

        Rows may be wanted in float32 or bfloat16, whatever the table has.
        """
        if column == "rows":
            if out.dtype == torch.float32:
                return self.storage.gather(handles, out)
            return out.copy_(self.storage.gather(handles))
        is_use = column in (slot.name for slot in self.use_slots)
        slot = out.view(torch.float32) if is_use else out  # the storage keeps the use of a row bit for bit in a float
        self.storage.gather_slot(column, handles, slot.unsqueeze(1) if slot.dim() == 1 else slot)
        return out

    def write_column(self, column: str, handles: Tensor, values: Tensor) -> None:
        """Overwrite one of `columns` of some rows, with values as `read_column` gives them."""
        if column == "rows":
            self.storage.scatter(handles, values.float(), {})
        elif column in (slot.name for slot in self.use_slots):
            self.storage.scatter(handles, None, {column: as_slot(values)})
        else:
            self.storage.scatter(handles, None, {column: values.unsqueeze(1) if values.dim() == 1 else values})

    def insert_blank(self, logical: int, ids: Tensor) -> Tensor:
        """Return the handles int64 [n] of new rows for distinct ids of a logical table that have none.

        Every column of them is to be written before anybody reads one.
        """
        self._rows_by_table = None
        return self.storage.insert_blank(torch.full(ids.shape, logical, dtype=torch.int32, device="cpu"), ids)

    def fill_column(self, column: str, handles: Tensor, value: float | None = None) -> None:
        """Give rows the value of a new row in a column of the state, or another one."""
        dtype, width = self.columns(state=True)[column]
        if value is None:
            value = next((slot.fill for slot in self.slots if slot.name == column), 0.0)
        shape = (len(handles), width) if width else (len(handles),)
        self.write_column(column, handles, torch.full(shape, value, dtype=dtype, device="cpu"))

    def read(self, handles: Tensor) -> dict[str, Tensor]:
        """Return all columns: "rows" float32 [n, dim], each slot float32 [n, width], use and "step" int32 [n]."""
        values = {}
        for column, (dtype, width) in self.columns(state=True).items():
            shape = (len(handles), width) if width else (len(handles),)
            kind = torch.float32 if column == "rows" else dtype
            values[column] = self.read_column(column, handles, torch.empty(shape, dtype=kind, device="cpu"))
        return values

    def write(self, tables: Tensor, ids: Tensor, rows: Tensor | None, state: Mapping[str, Tensor]) -> None:
        """Insert or overwrite rows (distinct pairs, float32 or as in files); state not given starts as in a new row.

        None stands for rows of zeros, those of a side table.
        """
        count = len(ids)
        fills = {
            slot.name: torch.full((count, slot.width), slot.fill, dtype=torch.float32, device=HOST)
            for slot in self.slots
            if slot.name not in state
        }
        slots = {slot.name: state[slot.name] for slot in self.slots if slot.name in state} | fills
        zeros = torch.zeros(count, dtype=torch.int32, device="cpu")
        slots |= {slot.name: as_slot(state.get(slot.name, zeros)) for slot in self.use_slots}
        step = state.get(STEP_SLOT, zeros)
        self._rows_by_table = None
        values = torch.zeros(count, self.dim, dtype=torch.float32, device=HOST) if rows is None else rows.float()
        self.storage.write(tables, ids, values, slots | {STEP_SLOT: step.reshape(count, 1)})

    def check_import(self, table: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return the ids of rows to be written; ValueError for a name, dtype, shape, step or id that is wrong."""
        if missing := {"ids", "rows"} - set(values):
            raise ValueError(f"rows for table {table!r} lack {sorted(missing)}")
        n = len(values["ids"])
        layout = {"ids": (torch.int64, 0), **self.columns(state=True), "rows": (torch.float32, self.dim)}
        for name, value in values.items():
            if name not in layout:
                raise ValueError(
                    f"table {table!r} has no {name!r}: it takes {sorted(layout)} with the attached optimizer"
                )
            dtype, width = layout[name]
            shape = (n, width) if width else (n,)
            if value.dtype != dtype or tuple(value.shape) != shape:
                raise ValueError(
                    f"{name!r} of table {table!r} must be {dtype} {list(shape)}, got {value.dtype} {list(value.shape)}"
                )
        if STEP_SLOT in values:
            check_steps(f"table {table!r}", values[STEP_SLOT])
        ids = values["ids"]
        if len(torch.unique(ids)) != n:
            raise ValueError(f"ids for table {table!r} are not distinct")
        return ids
