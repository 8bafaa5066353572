"""An optimizer step as the sparse side sees it: its ids, where their rows live, one leaf of rows, its gradients."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .jagged import Bags
from .kernels import functions_at
from .lookup import TakeRows, TapLeaf
from .pooling import pool
from .table import PhysicalTable
from .transfer import empty_pinned, move

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection


NO_ROW, DELETED = -1, -2  # handles of ids without a row, and of rows that went after they were fetched


@dataclass
class TableShare:
    """What one physical table has to do with a step; U ids asked for here, R received from all ranks, O owned here.

    `index` is where the ids were given, `leaf` where `fetch` puts it, the rest on the device of the table.
    """

    table: PhysicalTable
    index: dict[tuple[int, str], Tensor]  # (micro-batch, feature) -> int64 [*ids.shape]: row of the leaf
    requested: int  # U
    inverse: Tensor | None  # int64 [R]: received id -> owned pair; None when R = O = U, in the same order (one rank)
    tables: Tensor  # int32 [O]: logical table inside the physical one
    ids: Tensor  # int64 [O]
    handles: Tensor  # int64 [O]; NO_ROW, DELETED: none
    complete: bool = False  # every handle is that of a row
    leaf: Tensor | None = None  # float32 [U, dim], after fetch

    def owned_rows(self, destination: torch.device) -> Tensor:
        """Rows float32 [R, dim] of the ids received, which will go to a destination."""
        pinned = self.table.device.type == "cpu" and destination.type == "cuda" and self.inverse is None
        out = empty_pinned((len(self.handles), self.table.dim), torch.float32) if pinned else None
        rows = self.table.gather(self.tables, self.ids, self.handles, out)
        return rows if self.inverse is None else self.table.backend.take_rows(rows, self.inverse)


@dataclass(eq=False)
class Step:
    """The ids of all micro-batches of one optimizer step, deduplicated, exchanged and (in training) inserted.

    Made by `DynamicEmbeddingCollection.prepare`. `fetch()` brings the rows; then `step[k]` are the embeddings of
    micro-batch k. Row handles stay valid while the step lives.
    """

    collection: "DynamicEmbeddingCollection"
    shares: list[TableShare]
    sent: Tensor  # int64 [world, physical tables]: ids asked of each rank
    received: Tensor  # int64 [world, physical tables]: ids that each rank asks of this one
    num_micro_batches: int
    serial: int  # counts the steps of a collection; the same on all ranks
    device: torch.device  # of the ids: where the leaves go
    bags: dict[tuple[int, str], Bags]  # (micro-batch, feature) of features that pool
    statistics: dict[str, int]
    inserts: bool = True  # prepared for training
    noted: int | None = None  # the step as of which the use of its rows was noted; None: it was not
    touched: set[str] = field(default_factory=set)  # logical tables that a backward pass reached since the last reduce

    def fetch(self, device: torch.device | None = None) -> "Step":
        """Bring the rows from their owners: one leaf float32 [unique ids, dim] per physical table. Collective.

        The leaves require gradients when the collection is in training mode and gradients are enabled. They go to
        `device`, by default that of the ids. Returns the step itself.

        Raises:
            ValueError: the leaves would need a sparse optimizer and none is attached.
            RuntimeError: called twice.
        """
        if self.is_fetched:
            raise RuntimeError("this step was fetched already: prepare() a new one to see newer rows")
        trains = self.collection.training and torch.is_grad_enabled()
        optimizer = self.collection.require_optimizer() if trains else None
        exchange = self.collection.exchange
        before = exchange.bytes_sent
        if device is not None:
            self._follow_to(device)
        rows = [share.owned_rows(self.device) for share in self.shares]
        leaves = exchange.swap(rows, self.received, self.sent, self.device)
        for share, leaf in zip(self.shares, leaves, strict=True):
            share.leaf = leaf.requires_grad_(trains)
        self.statistics["bytes_sent"] += exchange.bytes_sent - before
        if optimizer is not None:
            optimizer.track(self)
        return self

    def _follow_to(self, device: torch.device) -> None:
        """What leads into the leaves goes where they go."""
        self.device = device
        for share in self.shares:
            share.index = dict(zip(share.index, move(list(share.index.values()), device), strict=True))
        self.bags = {use: bags.to(device) for use, bags in self.bags.items()}

    @property
    def is_fetched(self) -> bool:
        return all(share.leaf is not None for share in self.shares)

    def __len__(self) -> int:
        return self.num_micro_batches

    def __getitem__(self, micro_batch: int) -> "MicroBatchEmbeddings":
        if not 0 <= micro_batch < len(self):
            raise IndexError(f"micro-batch {micro_batch} of a step of {len(self)}")
        if not self.is_fetched:
            raise RuntimeError("call fetch() before reading embeddings of a step")
        return MicroBatchEmbeddings(self, micro_batch)

    def note_backward(self, table: str) -> None:
        """Called when a gradient of a logical table arrives."""
        self.collection.require_optimizer().track(self)
        self.touched.add(table)

    def drop_gradients(self) -> None:
        """Forget the gradients that have arrived."""
        self.touched.clear()
        for share in self.shares:
            if share.leaf is not None:
                share.leaf.grad = None


class MicroBatchEmbeddings(Mapping[str, Tensor]):
    """Feature -> embeddings of one micro-batch, differentiable to the leaf of its step.

    float32 [*ids.shape, dim] of a feature without pooling (jagged ids: [n, dim]), [*ids.shape[:-1], dim] of one that
    pools dense ids, [bags, dim] of one that pools jagged ids.
    """

    def __init__(self, step: Step, micro_batch: int) -> None:
        self._step = step
        self._shares = {name: s for s in step.shares for (k, name) in s.index if k == micro_batch}
        self._micro_batch = micro_batch

    def _use(self, feature: str) -> tuple[TableShare, Tensor, Tensor]:
        if feature not in self._shares:
            raise KeyError(f"feature {feature!r} is not in this micro-batch, which has {sorted(self._shares)}")
        share = self._shares[feature]
        assert share.leaf is not None
        return share, share.leaf, share.index[self._micro_batch, feature]

    def __getitem__(self, feature: str) -> Tensor:
        share, leaf, index = self._use(feature)
        table = self._step.collection.features[feature].table
        note = lambda: self._step.note_backward(table)  # noqa: E731
        functions = functions_at(leaf.device, share.table.backend)
        if (bags := self._step.bags.get((self._micro_batch, feature))) is not None:
            return pool(leaf, index, bags, functions, note)
        rows: Tensor = TakeRows.apply(leaf, index, functions, note)
        return rows

    def rows(self, feature: str) -> tuple[Tensor, Tensor]:
        """Return (leaf float32 [U, dim], index int64 [*ids.shape]) for kernels that gather by themselves.

        leaf[index] is what `self[feature]` returns, before pooling; gradients of the leaf are taken as those of the
        feature.
        """
        _, leaf, index = self._use(feature)
        table = self._step.collection.features[feature].table
        tapped: Tensor = TapLeaf.apply(leaf, lambda: self._step.note_backward(table))
        return tapped, index

    def __iter__(self) -> Iterator[str]:
        return iter(self._shares)

    def __len__(self) -> int:
        return len(self._shares)
