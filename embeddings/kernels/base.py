"""What a backend of dynamic tables must offer: one storage per physical table and three free functions.

A *physical table* holds the rows of one or more *logical tables* of equal width. A row belongs to the pair
(logical index inside the physical table, 64-bit id): every int64 is a valid id, none is reserved. Its *handle* is an
int64 >= 0 that stays the same for the life of the row; -1 stands for "absent".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from grzoo.embeddings.hashing import bucket
from torch import Tensor

STEP_SLOT = "step"  # int32 [n, 1], always present: how many updates the row has had
ROUNDINGS = ("stochastic", "nearest")  # of updates to bfloat16 rows
MAX_STEP = 2**31 - 2  # where the count of updates of a row stays


def check_steps(where: str, steps: Tensor) -> None:
    """Raise ValueError for steps int32 [n] that no row can have."""
    wrong = steps[(steps < 0) | (steps > MAX_STEP)]
    if len(wrong):
        raise ValueError(
            f"{STEP_SLOT!r} of {where} has {int(wrong[0])}: it counts the updates of a row, 0 to {MAX_STEP}; leave it "
            "out, or load with state=False, to start afresh"
        )


class BackendUnavailable(RuntimeError):
    """A backend cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Slot:
    """Optimizer state of a row: float32 [width], `fill` in a row that is new. `width` is the table's dim or 1."""

    name: str
    width: int
    fill: float = 0.0


@dataclass(frozen=True, eq=False)
class RowInit:
    """Initial values of one logical table, reduced to what a kernel needs.

    With bits = fold(fold(key, id), column) (see `keyed.py`):

        uniform:  float32(scale * 2^-23) * float32((bits >>> 40) - 2^23)        in [-scale, scale)
        quantile: float32(scale) * quantiles[bits >>> 48]                       normal laws, by a 65,536-entry table
        constant: float32(scale)

    Each is one float32 multiplication, so that all backends agree bit for bit.
    """

    kind: str
    key: int  # keyed(seed, string_key(init_key)), as a signed int64
    scale: float
    quantiles: Tensor | None = None  # float32 [65536], for kind == "quantile"


class Unique(NamedTuple):
    """The distinct (table, id) pairs of a list in the order of their first occurrence."""

    ids: Tensor  # int64 [u]
    tables: Tensor | None  # int32 [u]; None when no tables were given
    inverse: Tensor  # int64 [n]: pair i of the input is the distinct pair inverse[i]
    counts: Tensor  # int64 [u]: occurrences


@runtime_checkable
class TableStorage(Protocol):
    """Index, rows and optimizer state of one physical table.

    Arguments named `tables` are int32 [n] (logical index), `ids` int64 [n], `handles` int64 [n], all contiguous and on
    the storage's device; n may be 0 everywhere. After `close` every method raises RuntimeError.
    """

    @property
    def dim(self) -> int:
        """Width of a row."""

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return torch.device("cpu")

    def set_slots(self, slots: Sequence[Slot]) -> None:
        """Set the layout of the optimizer state (without the step slot, which is always there).

        Before or after insertion. A slot that keeps its name and width keeps its values, a new one gets its fill value
        in every existing row, one that is no longer named is dropped.
        """

    def find(self, tables: Tensor, ids: Tensor) -> Tensor:
        """Return the handles int64 [n]; -1 where the pair is absent. Never changes the table. Pairs may repeat."""

    def find_or_insert(self, tables: Tensor, ids: Tensor) -> tuple[Tensor, int]:
        """Return the handles int64 [n] and how many rows were inserted. Pairs must be distinct within the call.

        A new row holds its initial value, the fill value in every slot, and step 0. Growing never moves a handle.
        """

    def gather(self, handles: Tensor, out: Tensor | None = None) -> Tensor:
        """Return rows float32 [n, dim], in `out` when given; zeros where the handle is -1. Handles may repeat.

        Those of bfloat16 rows are exact.
        """

    def gather_slot(self, name: str, handles: Tensor, out: Tensor | None = None) -> Tensor:
        """Return [n, width] of a slot, in `out` when given: float32, or int32 [n, 1] for "step". Handles are valid."""

    def scatter(self, handles: Tensor, rows: Tensor | None, slots: Mapping[str, Tensor]) -> None:
        """Overwrite rows (float32 [n, dim], None = leave) and the named slots. Handles are valid and distinct.

        bfloat16 rows take the nearest values.
        """

    def erase(self, tables: Tensor, ids: Tensor) -> int:
        """Delete rows with their state and return how many there were. Absent pairs are ignored.

        A pair that is inserted again starts afresh: initial value, fill values, step 0.
        """

    def update(self, rule: str, handles: Tensor, grads: Tensor, keys: Tensor | None = None, **hyper: float) -> None:
        """Apply one optimizer step to rows, in place.

        `rule` is one of RULES in `kernels/rules.py`, with its formulas, slots and hyperparameters; `grads` is float32
        [n, dim]; handles are valid and distinct. The step slot of each row is increased by one first, until it is
        MAX_STEP. The result goes to bfloat16 rows by `kernels/rounding.py`; `keys` int64 [n] are those of the rows
        where that is stochastic.
        """

    def keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return tables int32 [n], ids int64 [n] and handles int64 [n] of all rows, in no particular order."""

    def sorted_keys(self, table: int) -> tuple[Tensor, Tensor]:
        """Return ids and handles int64 [n] of one logical table, sorted by (bucket, id): the order of files."""
        tables, ids, handles = self.keys()
        mine = tables == table
        ids, handles = ids[mine], handles[mine]
        order = torch.argsort(ids)
        order = order[torch.argsort(bucket(ids[order]), stable=True)]
        return ids[order], handles[order]

    def write(self, tables: Tensor, ids: Tensor, rows: Tensor, slots: Mapping[str, Tensor]) -> None:
        """Insert or overwrite rows (distinct pairs): float32 [n, dim], and all slots with "step", as in `scatter`."""
        handles, _ = self.find_or_insert(tables, ids)
        self.scatter(handles, rows, slots)

    def insert_blank(self, tables: Tensor, ids: Tensor) -> Tensor:
        """Return the handles int64 [n] of new rows for distinct pairs that have none.

        The caller scatters rows, all slots and "step" before anybody reads: until then they may hold anything.
        """
        return self.find_or_insert(tables, ids)[0]

    def reserve(self, rows: int) -> None:
        """Make room for `rows` more rows. MemoryError, with nothing changed, where there is none. May do nothing."""
        return

    def __len__(self) -> int:
        """Number of rows."""

    def memory_bytes(self) -> int:
        """Bytes that are allocated for index, rows and state."""

    def close(self) -> None:
        """Free everything. Closing twice is allowed."""


@runtime_checkable
class HasInitialRows(Protocol):
    """A storage that computes initial values where it is."""

    def gather_or_initial(self, handles: Tensor, tables: Tensor, ids: Tensor) -> Tensor:
        """Return rows float32 [n, dim]; where the handle is -1, the initial value of the pair."""


class Backend(Protocol):
    """A way to run tables: `get_backend(name)` returns one."""

    @property
    def name(self) -> str:
        """The name that `get_backend` knows it by."""

    @property
    def device(self) -> torch.device:
        """Where its tables are, and the tensors that its functions take."""
        return torch.device("cpu")

    def create(self, dim: int, inits: Sequence[RowInit], rounding: str | None = None) -> TableStorage:
        """Return an empty storage of rows [dim]; `inits[t]` is the initial law of logical table t.

        Rows are float32, or bfloat16 when `rounding` (one of ROUNDINGS) says how their updates are rounded. Initial
        values are rounded to the nearest. The state is float32.
        """

    def unique(self, ids: Tensor, tables: Tensor | None = None) -> Unique:
        """Return the distinct ids int64 (or pairs, when `tables` int32 is given) in first-seen order."""

    def squared_norm(self, values: Tensor) -> float | Tensor:
        """Return the sum of the squares of values float32 [n, dim], in float64; the same for any number of threads.

        A tensor without dimensions where the values are on a device, so that the caller waits once for several.
        """
        return float(values.double().square().sum())

    def take_rows(self, values: Tensor, index: Tensor) -> Tensor:
        """Return values[index]: float32 [n, dim] of float32 [m, dim], index int64 [n] in [0, m)."""
        return values.index_select(0, index)

    def segment_sum(self, values: Tensor, index: Tensor, num_segments: int, out: Tensor | None = None) -> Tensor:
        """Return s float32 [num_segments, dim]: s[j] sums values[i] (float32 [n, dim]) over index[i] == j (int64 [n]).

        Deterministic: summed one after the other in the order of i, whatever the number of threads. With `out`, the
        sums are added to it in place (starting from what it holds) and it is returned.
        """

    def pool_rows(self, values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return p float32 [bags, dim]: p[b] sums weights[i] * values[index[i]] over offsets[b] <= i < offsets[b + 1].

        Summed from zero in the order of i. values float32 [m, dim], index int64 [n] in [0, m), offsets int64 [bags + 1]
        from 0 to n, weights float32 [n] (None: 1).
        """
        rows = self.take_rows(values, index)
        if weights is not None:
            rows = rows * weights[:, None]
        return self.segment_sum(rows, _bag_numbers(offsets, len(index)), len(offsets) - 1)

    def unpool_rows(
        self, grads: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None, out: Tensor
    ) -> Tensor:  # fmt: skip
        """out[index[i]] += weights[i] * grads[b] for each i of bag b, in the order of i: the adjoint of `pool_rows`.

        grads float32 [bags, dim], out float32 [m, dim], which is returned; the others as there.
        """
        rows = self.take_rows(grads, _bag_numbers(offsets, len(index)))
        if weights is not None:
            rows = rows * weights[:, None]
        return self.segment_sum(rows, index, len(out), out=out)


def _bag_numbers(offsets: Tensor, count: int) -> Tensor:
    """The bag int64 [count] of each element."""
    bags = torch.arange(len(offsets) - 1, dtype=torch.int64, device=offsets.device)
    return bags.repeat_interleave(offsets.diff(), output_size=count)
