"""From the ids of micro-batches to a Step: dedup, routing to the owners, dedup again, find or insert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .hashing import owner
from .jagged import Bags, FeatureInput, bags_of, check_input, ids_of
from .kernels import Unique
from .step import Step, TableShare
from .table import PhysicalTable

if TYPE_CHECKING:
    from .collection import DynamicEmbeddingCollection

MicroBatches = Sequence[Mapping[str, FeatureInput]]


@dataclass
class _Request:
    """The distinct pairs that this rank needs of one physical table, ordered by (owner, logical table)."""

    ids: Tensor  # int64 [U]
    counts: Tensor  # int64 [world, logical tables]
    index: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # (micro-batch, feature) -> int64 [*ids.shape]


def prepare_step(collection: "DynamicEmbeddingCollection", micro_batches: MicroBatches, *, insert: bool) -> Step:
    """See `DynamicEmbeddingCollection.prepare`. Three collectives: counts with the error flag, ids, and the outcome."""
    exchange = collection.exchange
    before = exchange.bytes_sent
    problem: Exception | None = None
    requests: list[_Request] = []
    bags: dict[tuple[int, str], Bags] = {}
    try:
        check_ids(collection, micro_batches)
        bags = _bags(collection, micro_batches)
        requests = [_request(collection, table, micro_batches) for table in collection.physical]
    except Exception as error:
        problem = error
    received_counts = _swap_counts(collection, requests, problem)

    sizes = [len(table.configs) for table in collection.physical]
    per_table = received_counts.split(sizes, dim=1)
    sent = torch.stack([request.counts.sum(1) for request in requests], dim=1)
    received = torch.stack([counts.sum(1) for counts in per_table], dim=1)
    ids = exchange.swap([request.ids for request in requests], sent, received)
    try:
        found = [
            _find(table, i, counts, distinct=exchange.world_size == 1, insert=insert)
            for table, i, counts in zip(collection.physical, ids, per_table, strict=True)
        ]
    except Exception as error:
        exchange.agree(error)  # raises
        raise
    exchange.agree(None)

    shares = [
        TableShare(table, request.index, len(request.ids), inverse, owned.tables, owned.ids, handles)
        for table, request, (owned, inverse, handles, _) in zip(collection.physical, requests, found, strict=True)
        if owned.tables is not None
    ]
    statistics = {
        "ids": sum(index.numel() for request in requests for index in request.index.values()),
        "unique_sent": sum(len(request.ids) for request in requests),
        "received": sum(len(i) for i in ids),
        "unique_owned": sum(len(share.ids) for share in shares),
        "inserted": sum(inserted for *_, inserted in found),
        "bytes_sent": exchange.bytes_sent - before,
    }
    device = next((ids_of(t).device for batch in micro_batches for t in batch.values()), torch.device("cpu"))
    return Step(
        collection, shares, sent, received, len(micro_batches), collection.next_serial(), device, bags, statistics
    )  # fmt: skip


def check_ids(collection: "DynamicEmbeddingCollection", micro_batches: MicroBatches) -> None:
    """Raise ValueError for a micro-batch that is not {known feature: int64 tensor or Jagged}, all on one device."""
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


def _bags(collection: "DynamicEmbeddingCollection", micro_batches: MicroBatches) -> dict[tuple[int, str], Bags]:
    found = {
        (k, name): bags_of(collection.features[name], given)
        for k, batch in enumerate(micro_batches)
        for name, given in batch.items()
    }
    return {use: bags for use, bags in found.items() if bags is not None}


def _request(collection: "DynamicEmbeddingCollection", table: PhysicalTable, micro_batches: MicroBatches) -> _Request:
    uses = [  # (micro-batch, feature, logical table, ids)
        ((k, name), collection.placement[collection.features[name].table][1], ids_of(given))
        for k, batch in enumerate(micro_batches)
        for name, given in batch.items()
        if collection.physical[collection.placement[collection.features[name].table][0]] is table
    ]
    flat = [ids.detach().reshape(-1).cpu() for _, _, ids in uses]
    ids = torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *flat])
    tables = None
    if len(table.configs) > 1:
        lengths = torch.tensor([len(f) for f in flat], dtype=torch.int64, device="cpu")
        logical = torch.tensor([logical for _, logical, _ in uses], dtype=torch.int32, device="cpu")
        tables = logical.repeat_interleave(lengths)
    unique = table.backend.unique(ids, tables)
    request_ids, counts, inverse = _by_owner(unique, collection.exchange.world_size, len(table.configs))
    pieces = inverse.split([len(f) for f in flat])
    index = {use: i.view(ids.shape).to(ids.device) for (use, _, ids), i in zip(uses, pieces, strict=True)}
    return _Request(request_ids, counts, index)


def _by_owner(unique: Unique, world_size: int, num_tables: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order distinct pairs by (owner, logical table): ids [U], counts [world, num_tables], inverse [n] into the ids.

    In this order the rows that come back are the leaf as they are, and counts say the table of each id.
    """
    if world_size == 1 and unique.tables is None:
        return unique.ids, torch.tensor([[len(unique.ids)]], dtype=torch.int64, device="cpu"), unique.inverse
    key = owner(unique.ids, world_size) * num_tables
    if unique.tables is not None:
        key += unique.tables
    order = torch.argsort(key, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), dtype=torch.int64, device="cpu")
    counts = torch.bincount(key, minlength=world_size * num_tables).view(world_size, num_tables)
    return unique.ids[order], counts, place[unique.inverse]


def _swap_counts(
    collection: "DynamicEmbeddingCollection", requests: list[_Request], problem: Exception | None
) -> Tensor:
    """Return how many ids of each logical table every rank asks for: int64 [world, logical tables].

    A flag beside the counts tells a problem of this rank to the others, so that all stop here.
    """
    exchange = collection.exchange
    if exchange.world_size == 1:
        exchange.agree(problem)
        return torch.cat([request.counts for request in requests], dim=1)
    num_tables = sum(len(table.configs) for table in collection.physical)
    payload = torch.zeros(exchange.world_size, 1 + num_tables, dtype=torch.int64, device="cpu")
    if problem is None:
        payload[:, 1:] = torch.cat([request.counts for request in requests], dim=1)
    else:
        payload[:, 0] = 1
    received = exchange.swap_counts(payload)
    if received[:, 0].any():
        exchange.agree(problem)
    return received[:, 1:]


def _find(
    table: PhysicalTable, ids: Tensor, counts: Tensor, *, distinct: bool, insert: bool
) -> tuple[Unique, Tensor | None, Tensor, int]:
    """Find or insert ids int64 [R] that arrived as counts [world, logical tables].

    Returns the owned pairs, inverse (None when they are the received ones), their handles, the number of inserted rows.
    """
    logical = torch.arange(counts.shape[1], dtype=torch.int32, device="cpu")
    tables = logical.repeat(len(counts)).repeat_interleave(counts.reshape(-1))
    if distinct:
        handles, inserted = table.lookup(tables, ids, insert=insert)
        return Unique(ids, tables, ids, ids), None, handles, inserted
    owned = table.backend.unique(ids, tables if len(table.configs) > 1 else None)
    if owned.tables is None:
        owned = owned._replace(tables=torch.zeros(len(owned.ids), dtype=torch.int32, device="cpu"))
    assert owned.tables is not None
    handles, inserted = table.lookup(owned.tables, owned.ids, insert=insert)
    return owned, owned.inverse, handles, inserted
