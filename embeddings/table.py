"""One physical table: the rows of logical tables that were merged because their rows have the same width."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .config import TableConfig
from .kernels import STEP_SLOT, Backend, RowInit, Slot, TableStorage, get_backend
from .kernels.rounding import row_keys, table_keys
from .policies import initial_rows, row_init
from .pretrained import PretrainedRows, load_pretrained
from .shared_rows import SharedRows


class PhysicalTable:
    """Index and rows of the logical tables `configs` (of one width), in a storage that is made at first use.

    A logical table is known here by its position in `configs`, which goes beside the id as a second key word: no bit of
    the id is used up by merging.
    """

    def __init__(self, configs: Sequence[TableConfig], *, seed: int, backend: str) -> None:
        self.configs = tuple(configs)
        self.dim = configs[0].embedding_dim
        self.rounding = configs[0].rounding
        assert all((config.embedding_dim, config.rounding) == (self.dim, self.rounding) for config in configs)
        self.slots: tuple[Slot, ...] = ()
        self._seed = seed
        self._backend_name = backend
        self._storage: TableStorage | None = None
        self._shared: SharedRows | None = None
        self._closed = False

    def empty_like(self) -> "PhysicalTable":
        """Return a table of the same layout without rows."""
        table = PhysicalTable(self.configs, seed=self._seed, backend=self._backend_name)
        table.slots = self.slots
        return table

    def copy(self) -> "PhysicalTable":
        """Return a table with a copy of the rows and their state."""
        table = self.empty_like()
        if len(self):
            tables, ids, handles = self.storage.keys()
            values = self.read(handles)
            table.write(tables, ids, values.pop("rows"), values)
        if self._shared is not None and table.shared is not None:
            table.shared.copy_from(self._shared)
        return table

    @property
    def backend(self) -> Backend:
        return get_backend(self._backend_name)

    @property
    def storage(self) -> TableStorage:
        """The rows. Raises RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError("this embedding table was closed")
        if self._storage is None:
            self._storage = self.backend.create(self.dim, self._laws(), self.rounding)
            self._storage.set_slots(self.slots)
        return self._storage

    @property
    def shared(self) -> SharedRows | None:
        """The rows of logical tables whose unknown ids share one, made at first use; None when no table has it."""
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
        return row_keys(table_keys(self._laws()), tables, ids)

    def _pretrained(self) -> dict[int, PretrainedRows]:
        """The vectors of the logical tables that start from a file."""
        return {
            logical: load_pretrained(config.initializer["file"], self.dim, config.name)
            for logical, config in enumerate(self.configs)
            if config.initializer["kind"] == "pretrained"
        }

    def set_slots(self, slots: Sequence[Slot]) -> None:
        """Set the layout of the optimizer state (see TableStorage.set_slots)."""
        self.slots = tuple(slots)
        if self._storage is not None:
            self._storage.set_slots(self.slots)
        if self._shared is not None:
            self._shared.set_slots(self.slots)

    def __len__(self) -> int:
        return 0 if self._storage is None and not self._closed else len(self.storage)

    def memory_bytes(self) -> int:
        """Bytes that are allocated for index, rows and state."""
        shared = 0 if self._shared is None else self._shared.storage.memory_bytes()
        return shared if self._storage is None and not self._closed else shared + self.storage.memory_bytes()

    def close(self) -> None:
        """Free the rows; use after it raises RuntimeError."""
        if self._storage is not None:
            self._storage.close()
        self._storage, self._shared, self._closed = None, None, True

    def num_rows(self, logical: int) -> int:
        """Number of rows of one logical table."""
        if len(self.configs) == 1 or len(self) == 0:
            return len(self)
        return int((self.storage.keys()[0] == logical).sum())

    def lookup(self, tables: Tensor, ids: Tensor, *, insert: bool) -> tuple[Tensor, int]:
        """Return the handles int64 [n] of distinct pairs (-1: no row) and how many rows were inserted."""
        if not insert:
            return self.storage.find(tables, ids), 0
        pretrained = self._pretrained()
        if not pretrained:
            return self.storage.find_or_insert(tables, ids)
        new = self.storage.find(tables, ids) < 0
        handles, inserted = self.storage.find_or_insert(tables, ids)
        for logical, vectors in pretrained.items():
            mine = new & (tables == logical)
            place = vectors.find(ids[mine])
            self.storage.scatter(handles[mine][place >= 0], vectors.rows[place[place >= 0]], {})
        return handles, inserted

    def gather(self, tables: Tensor, ids: Tensor, handles: Tensor) -> Tensor:
        """Return rows float32 [n, dim]; an id without a row (handle -1) gets what its table says of unknown ids."""
        rows = self.storage.gather(handles)
        for logical, config in enumerate(self.configs):
            if config.unknown == "zeros":
                continue
            absent = (handles < 0) & (tables == logical)
            if not absent.any():
                continue
            if config.unknown == "initial":
                rows[absent] = self._initial(logical, ids[absent])
            else:
                assert self.shared is not None
                shared = self.shared.storage.gather(self.shared.handles(tables[absent].cpu()))
                rows[absent] = shared.to(rows.device)
        return rows

    def _initial(self, logical: int, ids: Tensor) -> Tensor:
        """Rows float32 [n, dim] as they are when they are born."""
        rows = initial_rows(self._laws()[logical], ids, self.dim)
        if (vectors := self._pretrained().get(logical)) is not None:
            place = vectors.find(ids)
            rows[place >= 0] = vectors.rows[place[place >= 0]]
        return rows if self.rounding is None else rows.to(torch.bfloat16).float()

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
            columns[STEP_SLOT] = (torch.int32, 0)
        return columns

    def read_column(self, column: str, handles: Tensor) -> Tensor:
        """Return one of `columns` of some rows, [n, width] or [n], in host memory."""
        if column == "rows":
            return self.storage.gather(handles).to("cpu", self.columns(state=False)["rows"][0])
        values = self.storage.gather_slot(column, handles).cpu()
        return values.flatten() if column == STEP_SLOT else values

    def read(self, handles: Tensor) -> dict[str, Tensor]:
        """Return all columns: "rows" float32 [n, dim], each slot float32 [n, width] and "step" int32 [n]."""
        values = {column: self.read_column(column, handles) for column in self.columns(state=True)}
        return values | {"rows": values["rows"].float()}

    def write(self, tables: Tensor, ids: Tensor, rows: Tensor, state: Mapping[str, Tensor]) -> None:
        """Insert or overwrite rows (distinct pairs, float32 or as in files); state not given starts as in a new row."""
        count = len(ids)
        slots = {
            slot.name: state[slot.name] if slot.name in state else torch.full((count, slot.width), slot.fill)
            for slot in self.slots
        }
        step = state[STEP_SLOT] if STEP_SLOT in state else torch.zeros(count, dtype=torch.int32)
        handles, _ = self.storage.find_or_insert(tables, ids)
        self.storage.scatter(handles, rows.float(), slots | {STEP_SLOT: step.reshape(count, 1)})
