"""The trained rows that ids without a row share: one per logical table with unknown="shared", the same on all ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from .config import TableConfig
from .kernels import STEP_SLOT, RowInit, Slot, get_backend
from .kernels.base import check_steps
from .kernels.rounding import row_keys, table_keys

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection
    from .table import PhysicalTable

SHARED_FILE = "embeddings-shared.safetensors"  # beside the shards of tables


class SharedRows:
    """The shared rows of the logical tables of one physical table.

    They are in a storage of their own, in plain PyTorch: beside the tables no id stands for "unknown", and nothing that
    counts, evicts or lists rows meets them. Every rank has a replica and applies the same updates to it.

    Args:
        configs: the logical tables, of one width.
        laws: their initial values; those of shared rows have keys of their own.
    """

    def __init__(self, configs: Sequence[TableConfig], laws: Sequence[RowInit]) -> None:
        self.tables = torch.tensor(
            [t for t, config in enumerate(configs) if config.unknown == "shared"], dtype=torch.int32, device="cpu"
        )
        self.storage = get_backend("naive").create(configs[0].embedding_dim, laws, configs[0].rounding)
        self._row_keys = table_keys(laws)
        self._slots: tuple[Slot, ...] = ()
        handles, _ = self.storage.find_or_insert(self.tables, torch.zeros_like(self.tables, dtype=torch.int64))
        self._handles = torch.full((len(configs),), -1, dtype=torch.int64, device="cpu")  # by logical table
        self._handles[self.tables.long()] = handles

    def set_slots(self, slots: Sequence[Slot]) -> None:
        """Set the layout of the optimizer state (see TableStorage.set_slots)."""
        self._slots = tuple(slots)
        self.storage.set_slots(slots)

    def handles(self, tables: Tensor) -> Tensor:
        """Return the handle in `storage` of the shared row of each logical table int32 [n]; -1 where it has none."""
        return self._handles[tables.long()]

    def keys(self, tables: Tensor) -> Tensor:
        """Return the keys int64 [n] of the rounding of shared rows."""
        return row_keys(self._row_keys, tables, torch.zeros_like(tables, dtype=torch.int64))

    def read(self, logical: int) -> dict[str, Tensor]:
        """Return "rows" float32 [1, dim], each slot float32 [1, width] and "step" int32 [1] of a logical table."""
        handle = self._handles[logical : logical + 1]
        values = {"rows": self.storage.gather(handle)}
        values |= {slot.name: self.storage.gather_slot(slot.name, handle) for slot in self._slots}
        return values | {STEP_SLOT: self.storage.gather_slot(STEP_SLOT, handle).flatten()}

    def write(self, logical: int, values: Mapping[str, Tensor]) -> None:
        """Overwrite the row of a logical table; state that is not given starts as in a new row."""
        state = {
            slot.name: values.get(slot.name, torch.full((1, slot.width), slot.fill, dtype=torch.float32, device="cpu"))
            for slot in self._slots
        }
        step = values.get(STEP_SLOT, torch.zeros(1, dtype=torch.int32, device="cpu"))
        state[STEP_SLOT] = step.reshape(1, 1)
        self.storage.scatter(self._handles[logical : logical + 1], values["rows"], state)

    def copy_from(self, other: "SharedRows") -> None:
        """Take over the rows and their state; the layouts are the same."""
        for logical in self.tables.tolist():
            self.write(logical, other.read(logical))


def shared_tensors(collection: "DynamicEmbeddingCollection", *, state: bool) -> dict[str, Tensor]:
    """Return what SHARED_FILE holds: "<table>.rows" and, with state, "<table>.<slot>" and "<table>.step" of each."""
    tables = [name for name, config in collection.tables.items() if config.unknown == "shared"]
    return {
        f"{name}.{part}": values
        for name in tables
        for part, values in collection.shared_row(name).items()
        if state or part == "rows"
    }


def load_shared(
    collection: "DynamicEmbeddingCollection",
    fresh: Sequence["PhysicalTable"],
    file: Path,
    names: Mapping[str, str],
    *,
    state: bool,
) -> None:
    """Read the shared rows that a file and a collection both have into the tables that a loader fills.

    `names` says what each table to load is called in the file.

    Raises ValueError for tensors that do not fit the tables, OSError or SafetensorError for a file that is damaged.
    """
    saved = load_file(file)
    for ours, name in names.items():
        config = collection.tables[ours]
        position, logical = collection.places[ours]
        shared = fresh[position].shared
        if config.unknown != "shared" or shared is None or f"{name}.rows" not in saved:
            continue
        expected = shared.read(logical) if state else {"rows": shared.read(logical)["rows"]}
        values = {part: saved.get(f"{name}.{part}", torch.empty(0)) for part in expected}
        for part, value in values.items():
            if value.shape != expected[part].shape or value.dtype != expected[part].dtype:
                raise ValueError(
                    f"{part!r} of the shared row of table {name!r} in {file} has shape {list(value.shape)}"
                )
        if state:
            check_steps(f"the shared row of table {name!r} in {file}", values[STEP_SLOT])
        shared.write(logical, values)
