"""What ranks and single processes of the policy tests run."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseAdagrad, SparseOptimizer, TableConfig
from grzoo.embeddings.io import load_tables, save_tables
from policy_reference import drifting_ids
from torch import Tensor

EVICTIONS: dict[str, dict[str, Any]] = {
    "lru": {"eviction": {"kind": "lru", "every": 3}, "max_rows": 90},
    "lfu": {"eviction": {"kind": "lfu", "every": 4, "half_life": 6, "max_evictions": 25}, "max_rows": 90},
    "ttl": {"eviction": {"kind": "ttl", "every": 2, "steps": 5, "min_rows": 60}},
    "ttl_ceiling": {"eviction": {"kind": "ttl", "every": 5, "steps": 9}, "max_rows": 80},
    "admitted_lru": {
        "admission": {"min_count": 3, "forget_after": 7},
        "eviction": {"kind": "lru", "every": 3},
        "max_rows": 40,
    },
}
STEPS, PER_STEP, SAVED = 24, 60, 14


def policy_tables(dim: int = 4) -> list[TableConfig]:
    """One table for each policy, all of one width, and one without."""
    tables = [TableConfig(name=name, embedding_dim=dim, **values) for name, values in EVICTIONS.items()]
    return [*tables, TableConfig(name="plain", embedding_dim=dim)]


def build(tables: Sequence[TableConfig], **options: Any) -> tuple[DynamicEmbeddingCollection, SparseOptimizer]:
    """Tables, each with a feature of its name, and their optimizer."""
    features = [FeatureConfig(name=table.name, table=table.name) for table in tables]
    collection = DynamicEmbeddingCollection(tables, features, **({"backend": "naive", "seed": 5} | options))
    return collection, SparseAdagrad(collection, lr=0.1)


def train_step(
    collection: DynamicEmbeddingCollection, optimizer: SparseOptimizer, batches: list[dict[str, Tensor]]
) -> None:
    """One optimizer step; the gradient of a row depends on its id's occurrences only."""
    step = collection.prepare(batches).fetch()
    for k in range(len(batches)):
        loss = sum((rows * 0.01).sum() + rows.square().sum() for rows in step[k].values())
        if isinstance(loss, Tensor):
            (loss * collection.exchange.world_size).backward()  # gradients of the ranks are averaged
    optimizer.step()


def contents(collection: DynamicEmbeddingCollection) -> dict[str, Any]:
    """Ids, use and what policies remember of each table on this rank."""
    found: dict[str, Any] = {}
    for name in collection.table_names:
        position, logical = collection.places[name]
        table = collection.physical[position]
        found[name] = {key: value.tolist() for key, value in collection.export_rows(name).items()}
        candidates = table.side.get("candidates")
        if candidates is not None:
            ids, handles = candidates.sorted_keys(logical)
            found[name]["candidates"] = [ids.tolist(), candidates.read(handles)["count"].tolist()]
        found[name]["evicted"] = [x.tolist() for x in collection.drain_evicted(name)[:2]]
    return found


def run(
    rank: int,
    world_size: int,
    group: Any = None,
    micro_batches: int = 2,
    *,
    save: str | None = None,
    resume: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train on a drifting stream dealt to ranks and micro-batches; pin some ids on the way.

    `save` and `resume` are folders: write the tables after step SAVED, or start with those that were written there.
    """
    collection, optimizer = build(policy_tables(), process_group=group, **options)
    names = collection.table_names
    if resume is not None:
        load_tables(collection, resume, state=True)
    for number, ids in enumerate(drifting_ids(STEPS, PER_STEP)):
        if number == SAVED and save is not None:
            save_tables(collection, save, state=True)
        if number < SAVED and resume is not None:
            continue
        mine = torch.from_numpy(ids)[rank::world_size]
        batches = [dict.fromkeys(names, mine[k::micro_batches]) for k in range(micro_batches)]
        train_step(collection, optimizer, batches)
        if number == 2:
            collection.pin("lru", torch.arange(-30 + rank, 0, world_size))
    return contents(collection)


def refuse(rank: int, world_size: int, group: Any) -> list[str]:
    """Errors that every rank must raise, although one rank alone has reason to."""
    messages = []
    limited = TableConfig(name="a", embedding_dim=2, max_rows=5)
    collection, _ = build([limited], process_group=group)
    lone = torch.arange(6) if rank == world_size - 1 else torch.arange(0)
    tight = TableConfig(name="a", embedding_dim=2, max_rows=5, eviction={"kind": "lru", "every": 1})
    evicting, optimizer = build([tight], process_group=group)
    for action in (
        lambda: collection.prepare([{"a": lone}]),
        lambda: train_step(evicting, optimizer, [{"a": lone}]),
        lambda: collection.erase("a", lone.float() if rank == 0 else lone),
        lambda: collection.prepare([{"a": lone}], insert=rank > 0 or world_size == 1),
    ):
        try:
            action()
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return [*messages, str(collection.total_rows()), str(evicting.total_rows())]


def without_memory(rank: int, world_size: int, group: Any) -> list[Any]:
    """Deleting rows where the last rank has no memory to log them: what each rank raises, and what rows it has then."""
    tight = TableConfig(name="a", embedding_dim=2, max_rows=8, eviction={"kind": "lru", "every": 2})
    found: list[Any] = []
    for number in range(2):
        collection, optimizer = build([tight], process_group=group)
        train_step(collection, optimizer, [{"a": torch.arange(40)}])
        if rank == world_size - 1:
            collection.physical[0].side_table("evicted").lookup = _no_memory  # type: ignore[method-assign]
        try:
            if number == 0:
                collection.erase("a", torch.arange(20))
            else:
                train_step(collection, optimizer, [{"a": torch.arange(8)}])
            found.append(None)
        except (MemoryError, RuntimeError) as error:
            found.append(f"{type(error).__name__}: {error}")
        found.append(collection.num_rows("a") == len(collection.ids("a")))
        found.append(collection.total_rows("a"))
    return found


def _no_memory(*_: Any, **__: Any) -> Any:
    raise MemoryError("nothing left")


def erase(rank: int, world_size: int, group: Any) -> list[Any]:
    """Erase ids that ranks give, some twice and some without a row."""
    collection, optimizer = build([TableConfig(name="a", embedding_dim=2)], process_group=group)
    train_step(collection, optimizer, [{"a": torch.arange(20)}])
    erased = collection.erase("a", torch.tensor([3, 100 + rank, 5 + rank]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        collection.pin("a", torch.arange(3))
    statistics = collection.statistics()["a"]
    return [list(erased), collection.total_rows(), len(caught), statistics["rows"], statistics["erased"]]


def all_worlds(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Run every job on 1, 2, ... ranks: the others look on. Each number of ranks resumes what one rank saved."""
    results: dict[str, Any] = {}
    for world in range(1, world_size + 1):
        group = dist.new_group(list(range(world)))
        if rank < world:
            results[str(world)] = {
                "merged": run(rank, world, group, save=f"{folder}/1" if world == 1 else None),
                "apart": run(rank, world, group, 1, merge=False) if world in (1, 3) else None,
                "resumed": run(rank, world, group, resume=f"{folder}/1", save=f"{folder}/again-{world}"),
                "refuse": refuse(rank, world, group),
                "erase": erase(rank, world, group),
                "without_memory": without_memory(rank, world, group),
            }
    return results
