"""DynamicEmbeddingCollection: features -> logical tables -> merged physical tables, sharded over ranks."""

import json
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import deletion, table_statistics
from .config import FeatureConfig, TableConfig
from .deletion import Erased, EvictedIds
from .eviction import evict_due
from .exchange import Exchange
from .hashing import owner
from .jagged import FeatureInput
from .kernels import Slot, check_backend
from .keyed import mix64, string_key
from .prepare import MicroBatches, prepare_step
from .step import MicroBatchEmbeddings, Step
from .table import PhysicalTable
from .table_statistics import Tally
from .use import LAST_USE

if TYPE_CHECKING:
    from .optimizers import SparseOptimizer

_NO_OPTIMIZER = (
    "the embedding tables are in training mode with gradients enabled, but no sparse optimizer is attached: they would "
    "stay untrained. Create one, e.g. SparseAdagrad(collection, lr=0.1), or train through grzoo.embeddings.engine, or "
    "call .eval() or use torch.no_grad()"
)


class DynamicEmbeddingCollection(nn.Module):
    """Embedding tables that grow: any int64 is a valid id, a row is born when training first sees its id.

    A module without parameters and buffers: `train()`/`eval()` reach it, while `state_dict()`, `.to()`, dtype casts,
    DDP and ZeRO do not. Tables of one width, precision and placement are merged into one physical one, those with
    policies and those that only track their use apart.
    With a process group each rank owns the ids that hash to it, and lookups are collective.

    Args:
        tables: the logical tables (TableConfig or its dict), with distinct names.
        features: the features and the tables they use (FeatureConfig or its dict); tables may be shared.
        seed: of the initial values.
        backend: of tables in host memory: "auto", "host" (C++) or "naive". Those on a device have one of their own.
        process_group: the data-parallel group; None: this process alone.
        merge: merge tables of equal layout and placement. Results do not depend on it.

    Raises ValueError for names that clash or do not exist, and for an unknown backend.

    Example:
        tables = DynamicEmbeddingCollection(
            [TableConfig(name="item", embedding_dim=8)], [FeatureConfig(name="input_ids", table="item")]
        )
        optimizer = SparseAdagrad(tables, lr=0.1)
        tables({"input_ids": torch.tensor([[3, -1, 3]])})["input_ids"].square().sum().backward()  # [1, 3, 8]
        optimizer.step()
        optimizer.zero_grad()
    """

    def __init__(
        self,
        tables: Sequence[TableConfig | Mapping[str, Any]],
        features: Sequence[FeatureConfig | Mapping[str, Any]],
        *,
        seed: int = 0,
        backend: str = "auto",
        process_group: dist.ProcessGroup | None = None,
        merge: bool = True,
    ) -> None:
        super().__init__()
        check_backend(backend)
        table_configs = [t if isinstance(t, TableConfig) else TableConfig.from_dict(t) for t in tables]
        feature_configs = [f if isinstance(f, FeatureConfig) else FeatureConfig.from_dict(f) for f in features]
        self.tables: dict[str, TableConfig] = _by_name("table", table_configs)
        self.features: dict[str, FeatureConfig] = _by_name("feature", feature_configs)
        if not self.tables:
            raise ValueError("a collection needs at least one table")
        for feature in feature_configs:
            if feature.table not in self.tables:
                raise ValueError(
                    f"feature {feature.name!r} uses table {feature.table!r}, which is not one of {sorted(self.tables)}"
                )
        self.seed = seed
        self._arguments: dict[str, Any] = {"seed": seed, "backend": backend, "merge": merge}
        groups = _group(table_configs, merge)
        self.physical: list[PhysicalTable] = [PhysicalTable(group, seed=seed, backend=backend) for group in groups]
        self.places: dict[str, tuple[int, int]] = {  # table -> (physical table, position in it)
            config.name: (p, position) for p, group in enumerate(groups) for position, config in enumerate(group)
        }
        self.exchange = Exchange(process_group)
        self._agreed = process_group is None
        self._serial = 0
        self.clock = 0  # optimizer steps that were applied
        self.steps: weakref.WeakSet[Step] = weakref.WeakSet()  # those that are alive
        self.has_hard_ceiling = any(config.has_hard_ceiling for config in table_configs)
        self.start_tallies()
        self._optimizer: weakref.ref[SparseOptimizer] | None = None

    # ------------------------------------------------------------------ lookup

    def prepare(self, micro_batches: MicroBatches, *, insert: bool | None = None, count: bool | None = None) -> Step:
        """Exchange the ids of all micro-batches of an optimizer step and find their rows. Collective.

        Args:
            micro_batches: feature -> ids int64 of any shape, possibly of no element, or `Jagged`, for each micro-batch.
                Ranks may differ in features, shapes and number of micro-batches.
            insert: insert ids that have no row; by default in training mode only.
            count: note the use of the ids (their occurrences and the step) for admission and eviction; by default what
                `insert` is. A second lookup of the same batch in a step passes False.

        Returns:
            A Step; `step.fetch()` brings the rows, `step[k][feature]` are the embeddings of micro-batch k.

        Raises:
            ValueError: bad input on this rank or another one, or a table that does not evict would exceed max_rows.
                All ranks raise.
        """
        if not self._agreed:
            self._check_agreement()
        insert = self.training if insert is None else insert
        return prepare_step(self, micro_batches, insert=insert, count=insert if count is None else count)

    @torch.compiler.disable  # ids are a matter of the host; a compiled model goes on with the rows
    def forward(
        self, ids: Mapping[str, FeatureInput], *, insert: bool | None = None, count: bool | None = None
    ) -> MicroBatchEmbeddings:
        """Look up one micro-batch: `prepare([ids], insert=insert, count=count).fetch()[0]`. Collective.

        Args:
            ids: feature -> int64 of any shape, or `Jagged`.
            insert, count: see `prepare`.

        Returns:
            feature -> float32 [*ids.shape, dim], or pooled: see MicroBatchEmbeddings.

        Raises:
            ValueError: bad input; or training with gradients and no sparse optimizer (tables would stay untrained).
        """
        if self.training and torch.is_grad_enabled():
            self.require_optimizer()
        return self.prepare([ids], insert=insert, count=count).fetch()[0]

    # ------------------------------------------------------------------ ranks

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return self.exchange.group

    def set_process_group(self, process_group: dist.ProcessGroup | None) -> None:
        """Shard over the ranks of a group. Collective.

        Rows that are already there are allowed when every rank has the same ones (each loaded the same export): then
        each keeps those that it owns. Raises ValueError when ranks differ, or rows would have to be gathered again.
        """
        if process_group is self.process_group:
            return
        exchange = Exchange(process_group)
        if self.exchange.world_size > 1 and self.total_rows() > 0:
            raise ValueError("tables that hold rows of one process group cannot move to another: save and load them")
        self._check_replicated(exchange)
        self.exchange, self._agreed = exchange, process_group is None
        if exchange.world_size > 1 and sum(map(len, self.physical)) > 0:
            self._keep_owned_rows()

    def _check_replicated(self, exchange: Exchange) -> None:
        digest = [0]
        for name in self.tables:
            ids, _ = self._sorted_keys(name)
            mixed = mix64(mix64(ids) + string_key(name))
            assert isinstance(mixed, Tensor)
            digest += [len(ids), int(mixed.sum())]
            if self.tables[name].unknown == "shared":
                digest += self.shared_row(name)["rows"].view(torch.int32).flatten().tolist()
        if len({tuple(d) for d in exchange.gather_ints(digest)}) > 1:
            raise ValueError("ranks hold different rows: shard tables that are empty, or loaded alike on every rank")

    def _keep_owned_rows(self) -> None:
        for physical in self.physical:
            for table in (physical, *physical.side.values()):
                tables, ids, _ = table.storage.keys()
                foreign = owner(ids, self.exchange.world_size) != self.exchange.rank
                table.erase(tables[foreign], ids[foreign])
        self.physical = [old.copy() for old in self.physical]  # gives the freed memory back
        self.start_tallies()

    def _check_agreement(self) -> None:
        configs = [[config.to_dict() for config in table.configs] for table in self.physical]
        fingerprint = string_key(json.dumps([self.seed, configs], sort_keys=True))
        different = len(set(map(tuple, self.exchange.gather_ints([fingerprint])))) > 1
        if different:
            raise ValueError("ranks built collections with different tables or seeds: give all the same configuration")
        self._agreed = True

    # ------------------------------------------------------------------ rows

    @property
    def table_names(self) -> list[str]:
        return list(self.tables)

    def num_rows(self, table: str | None = None) -> int:
        """Return the number of rows on this rank, of one table or of all."""
        if table is None:
            return sum(map(len, self.physical))
        physical, position = self._place(table)
        return physical.num_rows(position)

    def total_rows(self, table: str | None = None) -> int:
        """Return the number of rows on all ranks, of one table or of all. Collective."""
        return self.exchange.sum_int(self.num_rows(table))

    def memory_bytes(self) -> int:
        """Return the bytes allocated on this rank for index, rows and optimizer state."""
        return sum(table.memory_bytes() for table in self.physical)

    def ids(self, table: str) -> Tensor:
        """Return the ids int64 [n] that have a row in a table on this rank, sorted by (bucket, id)."""
        return self._sorted_keys(table)[0]

    def export_rows(self, table: str) -> dict[str, Tensor]:
        """Return the rows of a table on this rank, sorted by (bucket, id).

        Returns:
            "ids" int64 [n], "rows" float32 [n, dim], "step" int32 [n] (updates so far), each optimizer slot float32
            [n, width], and where the table tracks its use "last_use" (optimizer step) and "count" int32 [n].
        """
        physical, _ = self._place(table)
        ids, handles = self._sorted_keys(table)
        return {"ids": ids, **physical.read(handles)}

    def import_rows(self, table: str, values: Mapping[str, Tensor]) -> int:
        """Insert or overwrite rows of a table and return how many; ids that another rank owns are skipped.

        Args:
            values: as `export_rows` gives them; ids distinct. What is absent starts as in a new row, used just now. A
                last use that is later than `clock`, as of tables that trained longer, counts as just now.

        Raises ValueError for shapes, dtypes, names, steps or repeated ids that do not fit.
        """
        physical, position = self._place(table)
        ids = physical.check_import(table, values)
        mine = owner(ids, self.exchange.world_size) == self.exchange.rank
        kept = {name: value[mine] for name, value in values.items()}
        ids, rows = kept.pop("ids"), kept.pop("rows")
        just_now = torch.full(ids.shape, self.clock, dtype=torch.int32, device="cpu")
        kept[LAST_USE] = kept.get(LAST_USE, just_now).clamp(0, self.clock)
        before = len(physical)
        physical.write(torch.full(ids.shape, position, dtype=torch.int32, device="cpu"), ids, rows, kept)
        self.tally(table).rows_before += len(physical) - before
        return len(ids)

    def shared_row(self, table: str) -> dict[str, Tensor]:
        """Return the row that unknown ids of a table share: as `export_rows`, without ids, n = 1.

        Raises ValueError for a table whose `unknown` is not "shared".
        """
        physical, position = self._place(table)
        if physical.shared is None or self.tables[table].unknown != "shared":
            raise ValueError(f"unknown ids of table {table!r} get {self.tables[table].unknown!r}, not a 'shared' row")
        return physical.shared.read(position)

    def erase(self, table: str, ids: Tensor) -> Erased:
        """Delete rows of a table with their state and admission counters, pinned ones too. Collective.

        To be called between steps. Gradients that wait for the rows are dropped; an id that returns starts afresh.

        Args:
            table: its name.
            ids: int64 of any shape; those of all ranks are taken together, and unknown ones are ignored.

        Returns:
            (rows, unknown): how many rows were deleted and how many distinct ids had none, on all ranks.

        Raises:
            ValueError: on every rank, for an unknown table or ids that are not int64.
        """
        return deletion.erase(self, table, ids)

    def pin(self, table: str, ids: Tensor) -> None:
        """Keep ids int64 of a table, those of all ranks, from being evicted until `unpin`. Collective.

        An id without a row stays pinned for when it gets one. Raises ValueError as `erase` does.
        """
        deletion.pin(self, table, ids, pinned=True)
        if self.tables[table].eviction is None:
            warnings.warn(f"pin has no effect on table {table!r}, which evicts nothing", stacklevel=2)

    def unpin(self, table: str, ids: Tensor) -> None:
        """Let ids int64 of a table be evicted again; those that are not pinned are ignored. Collective."""
        deletion.pin(self, table, ids, pinned=False)

    def drain_evicted(self, table: str) -> EvictedIds:
        """Return the ids of a table that lost their row on this rank, by eviction or `erase`, and forget them.

        Returns:
            (ids int64 [n] sorted by (bucket, id), steps int64 [n], dropped). An id appears once, with the last step. It
            may have a row again. `dropped` counts older entries that no longer fitted into the log of this rank.
        """
        self.check_table(table)
        return deletion.drain_evicted(self, table)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Return what happened to each table since the last call (or since it was made or loaded). Collective.

        Returns:
            table -> rows now, growth, new_rows, evicted, erased (numbers of rows); new_row_rate and unknown_rate, per
            distinct id of a step; dedup_ratio (ids per distinct id of a rank and step) and owner_dedup_ratio (distinct
            ids of ranks per distinct id of the step); rows_by_rank and load_imbalance (largest over mean).
        """
        return table_statistics.statistics(self)

    def tally(self, table: str) -> Tally:
        """Return what statistics count of a table on this rank."""
        return self._tallies[table]

    def start_tallies(self) -> None:
        """Count anew from the rows that there are."""
        self._tallies = {name: Tally(rows_before=self.num_rows(name)) for name in self.tables}
        self.unsettled: dict[tuple[int, str], Tensor] = {}  # (physical table, field) -> counts, still on a device

    def replace_physical(self, tables: list[PhysicalTable]) -> None:
        """Take over other rows, as a loader does; those that were here are freed, with gradients that wait for them."""
        if self.optimizer is not None:
            self.optimizer.discard()
        old, self.physical = self.physical, tables
        for table in old:
            table.close()
        self.start_tallies()

    def close(self) -> None:
        """Free all rows. Use after it raises RuntimeError."""
        for table in self.physical:
            table.close()

    def check_table(self, table: str) -> None:
        """Raise ValueError unless there is a table of this name."""
        if table not in self.places:
            raise ValueError(f"no table {table!r}: the tables are {self.table_names}")

    def _place(self, table: str) -> tuple[PhysicalTable, int]:
        self.check_table(table)
        physical, position = self.places[table]
        return self.physical[physical], position

    def _sorted_keys(self, table: str) -> tuple[Tensor, Tensor]:
        physical, position = self._place(table)
        return physical.sorted_keys(position)

    # ------------------------------------------------------------------ optimizer

    @property
    def optimizer(self) -> "SparseOptimizer | None":
        """The attached sparse optimizer; None when there is none, or it was garbage-collected."""
        return None if self._optimizer is None else self._optimizer()

    def require_optimizer(self) -> "SparseOptimizer":
        """Return the attached sparse optimizer; ValueError when there is none."""
        optimizer = self.optimizer
        if optimizer is None:
            raise ValueError(_NO_OPTIMIZER)
        return optimizer

    def attach(self, optimizer: "SparseOptimizer", layout: Callable[[int], Sequence[Slot]]) -> None:
        """Called by a sparse optimizer: remember it (weakly) and give rows its state, `layout(dim)`.

        State of an earlier optimizer that has the same slots stays. Raises ValueError when another one is attached.
        """
        current = self.optimizer
        if current is not None and current is not optimizer:
            raise ValueError(f"{type(current).__name__} is attached to these tables already: delete it first")
        for table in self.physical:
            table.set_slots(layout(table.dim))
        self._optimizer = weakref.ref(optimizer)

    # ------------------------------------------------------------------ steps

    def watch(self, step: Step) -> None:
        """Called by `prepare`: remember a step (weakly) for as long as it may use its row handles."""
        self.steps.add(step)

    def steps_in_flight(self) -> list[Step]:
        """Return the steps that were prepared to insert and not fetched, and those that wait for the optimizer."""
        pending = () if self.optimizer is None else self.optimizer.pending
        return [*pending, *(step for step in self.steps if step.inserts and not step.is_fetched)]

    def end_step(self) -> None:
        """Called by the optimizer when it has applied a step: advance the clock, evict what is due. Collective."""
        self.clock += 1
        if any(table.has_policy for table in self.physical):
            evict_due(self)

    def next_serial(self) -> int:
        """Number the next step."""
        self._serial += 1
        return self._serial

    # ------------------------------------------------------------------ module

    def __deepcopy__(self, memo: dict[int, Any]) -> "DynamicEmbeddingCollection":
        """An independent copy of configs, rows and optimizer state, on the same process group, without an optimizer."""
        configs = list(self.tables.values()), list(self.features.values())
        twin = type(self)(*configs, process_group=self.process_group, **self._arguments)
        memo[id(self)] = twin
        twin.train(self.training)
        twin.physical = [table.copy() for table in self.physical]
        twin.clock = self.clock
        twin.start_tallies()
        return twin

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "tables are not pickled, nor is a model that holds them: write them with save_pretrained (a model) or "
            "save_tables, and let the other process load the folder"
        )

    def extra_repr(self) -> str:
        if any(table.is_closed for table in self.physical):
            return "closed"
        tables = ", ".join(f"{c.name}: [{self.num_rows(c.name)}, {c.embedding_dim}]" for c in self.tables.values())
        return f"{tables}; features={list(self.features)}"


def _by_name(what: str, configs: Sequence[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for config in configs:
        if config.name in named:
            raise ValueError(f"two {what}s are called {config.name!r}: names must be distinct")
        named[config.name] = config
    return named


def _group(configs: Sequence[TableConfig], merge: bool) -> list[list[TableConfig]]:
    """Tables that share a physical one: those whose rows have one layout, in the order given."""
    if not merge:
        return [[config] for config in configs]
    groups: dict[tuple[int, str | None, str, bool, bool], list[TableConfig]] = {}
    for config in configs:
        # By has_policy too: tables without policies pay for none.
        layout = config.embedding_dim, config.rounding, config.placement, config.tracks_use, config.has_policy
        groups.setdefault(layout, []).append(config)
    return list(groups.values())
