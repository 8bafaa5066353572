"""From the ids of micro-batches to a Step: dedup, routing to the owners, dedup again, find or insert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .admission import Visit, check_ceilings, visit
from .hashing import owner
from .jagged import Bags, FeatureInput, bags_of, check_input, ids_of
from .kernels import Unique
from .step import Step, TableShare
from .table import PhysicalTable
from .table_statistics import note_lookup
from .transfer import HOST, move

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection

MicroBatches = Sequence[Mapping[str, FeatureInput]]


class _Use(NamedTuple):
    """A feature of a micro-batch."""

    key: tuple[int, str]  # (micro-batch, feature)
    logical: int  # table inside the physical one
    ids: Tensor  # int64 of any shape


@dataclass
class _Request:
    """The distinct pairs that this rank needs of one physical table, ordered by (owner, logical table), on its device.

    The counts are wanted in host memory: `_ask` brings those of all tables there at once.
    """

    ids: Tensor  # int64 [U]
    counts: Tensor  # int64 [world, logical tables]
    occurrences: Tensor | None  # int64 [U], of each id on this rank; None unless the owner counts them
    index: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # (micro-batch, feature) -> int64 [*ids.shape]


@dataclass
class _Asked:
    """What this rank asks of all ranks, or the problem that kept it from asking."""

    requests: list[_Request] = field(default_factory=list)  # one per physical table
    bags: dict[tuple[int, str], Bags] = field(default_factory=dict)
    device: torch.device = HOST  # of the ids
    problem: Exception | None = None


@dataclass
class _Owned:
    """The distinct pairs that this rank was asked for in one physical table, as the owner of their rows."""

    table: PhysicalTable
    tables: Tensor  # int32 [O]
    ids: Tensor  # int64 [O]
    inverse: Tensor | None  # int64 [R]: received id -> pair; None when R = O, in the same order
    visit: Visit | None  # in a table with policies: what was decided
    handles: Tensor = field(init=False)  # int64 [O]; -1: no row
    inserted: int = 0
    complete: bool = False  # every pair has a row

    def commit(self, now: int, *, insert: bool) -> None:
        """Find the rows, insert those that are missing, note their use as of step `now`."""
        if self.visit is None:
            self.handles, self.inserted = self.table.lookup(self.tables, self.ids, insert=insert)
            self.complete = insert
            return
        self.inserted = self.visit.commit(now)
        self.handles = self.visit.handles
        self.complete = insert and len(self.visit.waiting) == 0


def prepare_step(
    collection: "DynamicEmbeddingCollection", micro_batches: MicroBatches, *, insert: bool, count: bool
) -> Step:
    """See `DynamicEmbeddingCollection.prepare`. Three collectives: counts with the error flag, ids, and the outcome.

    Tables with max_rows and without eviction need one more, and an id brings its occurrences where a policy counts.
    """
    exchange = collection.exchange
    before = exchange.bytes_sent
    asked = _ask(collection, micro_batches, count=count)
    requests = asked.requests
    per_table = _swap_counts(collection, asked, flags=2 * insert + 4 * count)
    sent = torch.stack([request.counts.sum(1) for request in requests], dim=1)
    received = sent if exchange.world_size == 1 else torch.stack([counts.sum(1) for counts in per_table], dim=1)
    ids, occurrences = _swap_ids(collection, requests, sent, received)
    owned = _answer(collection, ids, occurrences, per_table, insert=insert, count=count)

    shares = [
        TableShare(o.table, request.index, len(request.ids), o.inverse, o.tables, o.ids, o.handles, o.complete)
        for request, o in zip(requests, owned, strict=True)
    ]
    statistics = {
        "ids": sum(index.numel() for request in requests for index in request.index.values()),
        "unique_sent": sum(len(request.ids) for request in requests),
        "received": sum(len(i) for i in ids),
        "unique_owned": sum(len(share.ids) for share in shares),
        "inserted": sum(o.inserted for o in owned),
        "bytes_sent": exchange.bytes_sent - before,
    }
    note_lookup(collection, shares, [r.counts for r in requests], per_table, insert=insert)
    step = Step(
        collection, shares, sent, received, len(micro_batches), collection.next_serial(), asked.device, asked.bags,
        statistics, insert, noted=collection.clock + 1 if count else None,
    )  # fmt: skip
    collection.watch(step)
    return step


def _ask(collection: "DynamicEmbeddingCollection", micro_batches: MicroBatches, *, count: bool) -> _Asked:
    asked = _Asked()
    try:
        asked.device = check_ids(collection, micro_batches)
        asked.bags = _bags(collection, micro_batches)
        uses = _uses(collection, micro_batches)
        asked.requests = [
            _request(collection, table, of_table, count=count)
            for table, of_table in zip(collection.physical, uses, strict=True)
        ]
        counts = move([request.counts for request in asked.requests], HOST)
        for request, on_host in zip(asked.requests, counts, strict=True):
            request.counts = on_host
    except Exception as error:
        asked.problem = error
    return asked


def _answer(
    collection: "DynamicEmbeddingCollection",
    ids: Sequence[Tensor],
    occurrences: Sequence[Tensor | None],
    counts: Sequence[Tensor],
    *,
    insert: bool,
    count: bool,
) -> list[_Owned]:
    """Find or insert the rows that ranks ask for, see `_decide`. Collective.

    When tables that do not evict would exceed max_rows nothing was changed, in no table of any rank.
    """
    exchange, distinct = collection.exchange, collection.exchange.world_size == 1
    owned: list[_Owned] = []
    problem: Exception | None = None
    try:
        for table, i, met, of_table in zip(collection.physical, ids, occurrences, counts, strict=True):
            owned.append(_decide(table, i, met, of_table, distinct=distinct, insert=insert, count=count))
    except Exception as error:
        problem = error
    if collection.has_hard_ceiling and insert:
        exchange.agree(problem)
        check_ceilings(collection, [o.visit for o in owned])
    try:
        for o in owned if problem is None else ():
            o.commit(collection.clock + 1, insert=insert)
    except Exception as error:
        problem = error
    exchange.agree(problem)
    return owned


def _swap_ids(
    collection: "DynamicEmbeddingCollection", requests: list[_Request], sent: Tensor, received: Tensor
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Exchange the ids, and the occurrences of those that are counted: int64 [R] per physical table."""
    counted = [p for p, request in enumerate(requests) if request.occurrences is not None]
    parts = [request.ids for request in requests]
    occurrences: list[Tensor | None] = [None] * len(requests)
    devices = [table.device for table in collection.physical]
    if not counted:
        return collection.exchange.swap(parts, sent, received, devices), occurrences
    parts += [o for o in (request.occurrences for request in requests) if o is not None]
    columns = [*range(len(requests)), *counted]
    devices += [devices[p] for p in counted]
    arrived = collection.exchange.swap(parts, sent[:, columns], received[:, columns], devices)
    for p, values in zip(counted, arrived[len(requests) :], strict=True):
        occurrences[p] = values
    return arrived[: len(requests)], occurrences


def check_ids(collection: "DynamicEmbeddingCollection", micro_batches: MicroBatches) -> torch.device:
    """Return where the ids are (the host, when there are none).

    Raises ValueError for a micro-batch that is not {known feature: int64 tensor or Jagged}, all on one device.
    """
    if isinstance(micro_batches, Mapping) or not isinstance(micro_batches, Sequence):
        raise ValueError("micro_batches must be a list of mappings feature -> ids; for one micro-batch pass [batch]")
    devices = set()
    for k, batch in enumerate(micro_batches):
        if not isinstance(batch, Mapping):
            raise ValueError(f"micro-batch {k} must be a mapping feature -> ids, got {type(batch).__name__}")
        for name, ids in batch.items():
            if name not in collection.features:
                raise ValueError(f"unknown feature {name!r} in micro-batch {k}: have {sorted(collection.features)}")
            devices.add(check_input(collection.features[name], ids))
    if len(devices) > 1:
        raise ValueError(f"ids of one step must be on one device, got {sorted(map(str, devices))}")
    return next(iter(devices), HOST)


def _bags(collection: "DynamicEmbeddingCollection", micro_batches: MicroBatches) -> dict[tuple[int, str], Bags]:
    found = {
        (k, name): bags_of(collection.features[name], given)
        for k, batch in enumerate(micro_batches)
        for name, given in batch.items()
    }
    return {use: bags for use, bags in found.items() if bags is not None}


def _uses(collection: "DynamicEmbeddingCollection", micro_batches: MicroBatches) -> list[list[_Use]]:
    """Return what each physical table is asked for."""
    uses: list[list[_Use]] = [[] for _ in collection.physical]
    for k, batch in enumerate(micro_batches):
        for name, given in batch.items():
            physical, logical = collection.places[collection.features[name].table]
            uses[physical].append(_Use((k, name), logical, ids_of(given)))
    return uses


def _request(
    collection: "DynamicEmbeddingCollection", table: PhysicalTable, uses: Sequence[_Use], *, count: bool
) -> _Request:
    device = table.device
    flat = move([use.ids.detach().reshape(-1) for use in uses], device)
    lengths = [ids.numel() for ids in flat]
    if len(flat) == 1:
        ids = flat[0].contiguous()
    else:
        ids = torch.cat([torch.empty(0, dtype=torch.int64, device=device), *flat])
    tables = None
    if len(table.configs) > 1:
        logical = torch.tensor([use.logical for use in uses], dtype=torch.int32, device=HOST)
        tables = _repeat(logical, torch.tensor(lengths, dtype=torch.int64, device=HOST), device)
    unique = table.backend.unique(ids, tables)
    request_ids, counts, inverse, order = _by_owner(unique, collection.exchange.world_size, len(table.configs))
    occurrences = None
    if count and table.has_policy:
        occurrences = unique.counts if order is None else unique.counts[order]
    pieces = move(inverse.split(lengths), [use.ids.device for use in uses])
    index = {use.key: piece.view(use.ids.shape) for use, piece in zip(uses, pieces, strict=True)}
    return _Request(request_ids, counts, occurrences, index)


def _repeat(values: Tensor, times: Tensor, device: torch.device) -> Tensor:
    """Return values [k] each repeated times int64 [k], both in host memory, on a device that nobody waits for."""
    on_device, repeats = move([values, times], device)
    return on_device.repeat_interleave(repeats, output_size=int(times.sum()))


def _by_owner(unique: Unique, world_size: int, num_tables: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Order distinct pairs by (owner, logical table): ids [U], counts [world, num_tables], inverse [n] into the ids.

    Last comes the order itself, int64 [U] (None: as they are).

    In this order the rows that come back are the leaf as they are, and counts say the table of each id.
    """
    if world_size == 1 and unique.tables is None:
        return unique.ids, torch.tensor([[len(unique.ids)]], dtype=torch.int64, device=HOST), unique.inverse, None
    key = owner(unique.ids, world_size) * num_tables
    if unique.tables is not None:
        key += unique.tables
    order = torch.argsort(key, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), dtype=torch.int64, device=order.device)
    edges = torch.arange(world_size * num_tables + 1, dtype=torch.int64, device=order.device)
    counts = torch.searchsorted(key[order], edges).diff().view(world_size, num_tables)  # bincount waits for a device
    return unique.ids[order], counts, place[unique.inverse], order


def _swap_counts(collection: "DynamicEmbeddingCollection", asked: _Asked, *, flags: int) -> Sequence[Tensor]:
    """Return how many ids of each physical table every rank asks for: int64 [world, logical tables].

    A word beside the counts tells a problem of this rank, or a call with other flags, to the others: all stop here.
    """
    exchange, requests, problem = collection.exchange, asked.requests, asked.problem
    if exchange.world_size == 1:
        exchange.agree(problem)
        return [request.counts for request in requests]
    num_logical = [len(table.configs) for table in collection.physical]
    payload = torch.zeros(exchange.world_size, 1 + sum(num_logical), dtype=torch.int64, device=HOST)
    payload[:, 0] = flags + (problem is not None)
    if problem is None:
        payload[:, 1:] = torch.cat([request.counts for request in requests], dim=1)
    received = exchange.swap_counts(payload)
    words = received[:, 0].tolist()
    if any(word & 1 for word in words):
        exchange.agree(problem)
    if len(set(words)) > 1:
        raise ValueError("ranks disagree on insert= or count= (or on training mode): all must give the same")
    return received[:, 1:].split(num_logical, dim=1)


def _decide(
    table: PhysicalTable, ids: Tensor, occurrences: Tensor | None, counts: Tensor,
    *, distinct: bool, insert: bool, count: bool,
) -> _Owned:  # fmt: skip
    """See what becomes of ids int64 [R] that arrived as counts [world, logical tables], each met occurrences [R] times.

    Only reads; `_Owned.commit` does it.
    """
    device = table.device
    tables, inverse = torch.zeros(len(ids), dtype=torch.int32, device=device), None
    if counts.shape[1] > 1:
        logical = torch.arange(counts.shape[1], dtype=torch.int32, device=HOST)
        tables = _repeat(logical.repeat(len(counts)), counts.reshape(-1), device)
    if not distinct:
        unique = table.backend.unique(ids, tables if len(table.configs) > 1 else None)
        ids, inverse = unique.ids, unique.inverse
        tables = torch.zeros(len(ids), dtype=torch.int32, device=device) if unique.tables is None else unique.tables
        if occurrences is not None:
            occurrences = torch.zeros_like(ids).index_add_(0, inverse, occurrences)
    has_visit = table.has_policy and (insert or count)
    found = visit(table, tables, ids, occurrences, insert=insert) if has_visit else None
    return _Owned(table, tables, ids, inverse, found)
