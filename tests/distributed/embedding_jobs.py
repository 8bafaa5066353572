"""What the ranks of the sharded-embedding tests run. Each job is collective and returns JSON."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from grzoo.embeddings import (
    DynamicEmbeddingCollection,
    FeatureConfig,
    SparseAdagrad,
    SparseAdamW,
    SparseOptimizer,
    SparseRowwiseAdagrad,
    SparseSGD,
    TableConfig,
)
from grzoo.embeddings.exchange import Exchange
from grzoo.embeddings.io import load_tables, save_tables
from torch import Tensor
from torch.distributed.distributed_c10d import Backend, BackendConfig

TABLES = [
    TableConfig(name="item", embedding_dim=6),
    TableConfig(name="wide", embedding_dim=10, initializer={"kind": "uniform", "scale": 0.1}),
    TableConfig(name="user", embedding_dim=6, unknown="initial"),
]
FEATURES = [
    FeatureConfig(name="input_ids", table="item"),
    FeatureConfig(name="label_ids", table="item"),
    FeatureConfig(name="context", table="wide"),
    FeatureConfig(name="user_ids", table="user"),
]
OPTIMIZERS: dict[str, Callable[[DynamicEmbeddingCollection], SparseOptimizer]] = {
    "sgd": lambda c: SparseSGD(c, lr=0.5, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda c: SparseAdagrad(c, lr=0.3, max_grad_norm=0.05),
    "rowwise_adagrad": lambda c: SparseRowwiseAdagrad(c, lr=0.3),
    "adamw": lambda c: SparseAdamW(c, lr={"item": 0.1, "wide": 0.05, "user": 0.1}, step_mode="global"),
}
EXTREME = [0, -1, 2**63 - 1, -(2**63), 1 << 52, (1 << 52) + 1]


def group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


def build(seed: int = 3, **options: Any) -> DynamicEmbeddingCollection:
    return DynamicEmbeddingCollection(TABLES, FEATURES, seed=seed, backend="naive", process_group=group(), **options)


def samples(step: int) -> list[dict[str, Tensor]]:
    """Seven samples of a global batch; ids repeat within and between them and include the extremes."""
    generator = torch.Generator().manual_seed(step)
    pool = torch.tensor(EXTREME + list(range(100, 110)))
    draw = lambda n: pool[torch.randint(len(pool), (n,), generator=generator)]  # noqa: E731
    return [
        {"input_ids": draw(n), "label_ids": draw(n)[None], "context": draw(2), "user_ids": draw(1)}
        for n in (5, 0, 3, 1, 9, 2, 4)
    ]


def weight(rows: Tensor, ids: Tensor) -> Tensor:
    """A loss whose gradient differs by id, column and value."""
    factors = torch.cos(ids.double().remainder(97))[..., None] + torch.arange(rows.shape[-1])
    return (rows * factors.float() + (rows * 3).square()).sum()


def train(
    rank: int, world_size: int, optimizer: str, micro_batches: int = 2, steps: int = 4, merge: bool = True
) -> Any:
    """Train on the samples of each step dealt to ranks and micro-batches; return this rank's rows and norms."""
    tables = build(merge=merge)
    sparse = OPTIMIZERS[optimizer](tables)
    norms = []
    for step in range(steps):
        mine = [s for i, s in enumerate(samples(step)) if i * i % world_size == rank]
        batches = [join(mine[k::micro_batches]) for k in range(micro_batches)]
        prepared = tables.prepare(batches).fetch()
        for k, batch in enumerate(batches):
            loss = sum((weight(prepared[k][f], ids) for f, ids in batch.items()), torch.zeros(()))
            (loss * world_size / 7).backward()
        assert sparse.reduce()
        norms.append(sparse.grad_norm)
        sparse.step()
    return {"rows": exported(tables), "norms": norms}


def join(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = [f.name for f in FEATURES]
    return {n: torch.cat([torch.empty(0, dtype=torch.int64), *(s[n].flatten() for s in batch)]) for n in names}


def exported(tables: DynamicEmbeddingCollection) -> dict[str, dict[str, list[Any]]]:
    """table -> tensor name -> nested lists, of this rank."""
    return {name: {k: v.tolist() for k, v in tables.export_rows(name).items()} for name in tables.table_names}


def fill(tables: DynamicEmbeddingCollection, rows: int = 500) -> None:
    """Give the tables the same rows, with state, on any number of ranks."""
    generator = torch.Generator().manual_seed(0)
    for name, config in tables.tables.items():
        ids = torch.cat([torch.tensor(EXTREME), torch.arange(rows)[1:] * 7919 - 10**6])
        n, dim = len(ids), config.embedding_dim
        values = {k: torch.randn(n, dim, generator=generator) for k in ("rows", "exp_avg", "exp_avg_sq")}
        step = torch.arange(n, dtype=torch.int32)
        tables.import_rows(name, {"ids": ids, "step": step, **values})


def save(rank: int, world_size: int, folder: str, max_shard_bytes: int) -> Any:
    tables = build()
    optimizer = OPTIMIZERS["adamw"](tables)
    fill(tables)
    save_tables(tables, folder, state=True, max_shard_bytes=max_shard_bytes)
    del optimizer
    return tables.total_rows("item")


def export(folder: str, max_shard_bytes: int) -> None:
    tables = build()
    optimizer = OPTIMIZERS["adamw"](tables)
    fill(tables)
    save_tables(tables, folder, state=False, max_shard_bytes=max_shard_bytes)
    del optimizer


def load(rank: int, world_size: int, folder: str) -> Any:
    tables = build()
    optimizer = OPTIMIZERS["adamw"](tables)
    load_tables(tables, folder)
    del optimizer
    return exported(tables)


def outcome(action: Callable[[], Any]) -> list[str]:
    """[exception type, message], or ["", ""]."""
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def bad_input(rank: int, world_size: int) -> Any:
    """The last rank is given something bad; afterwards the tables must still work."""
    tables = build().eval()
    good = {"input_ids": torch.tensor([1, 2])}
    bad: list[Any] = [{"input_ids": torch.tensor([1.0])}, {"nope": torch.tensor([1])}, {"input_ids": [1]}, None, {}]
    results = [outcome(lambda b=b: tables.prepare([b if rank == world_size - 1 else good])) for b in bad]  # type: ignore[misc]
    return results, list(tables(good)["input_ids"].shape)


def failing_owner(rank: int, world_size: int) -> Any:
    """Insertion fails on the first rank, as it would without memory."""
    tables = build()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no memory for rows")

    if rank == 0:
        tables.physical[0].lookup = fail  # type: ignore[method-assign]
    return outcome(lambda: tables.prepare([{"input_ids": torch.arange(100)}]))


def other_config(rank: int, world_size: int) -> Any:
    tables = build(seed=rank)
    return outcome(lambda: tables.prepare([]))


def not_finite(rank: int, world_size: int) -> Any:
    """A NaN in the gradient of one rank stops all of them, unless they asked."""
    tables = build()
    optimizer = OPTIMIZERS["sgd"](tables)
    ids = {"input_ids": torch.tensor([5, 6])}

    def backward() -> None:
        (tables(ids)["input_ids"].sum() * (float("nan") if rank == 1 else 1.0)).backward()

    tables(ids)
    before = exported(tables)
    backward()
    raised = outcome(optimizer.step)[0]
    backward()
    finite = optimizer.reduce()
    optimizer.step()
    return raised, finite, exported(tables) == before


def one_silent_rank(rank: int, world_size: int) -> Any:
    """Rank 0 has no gradient (its loss used no embedding): its share is zero, nobody hangs."""
    tables = build()
    optimizer = OPTIMIZERS["sgd"](tables)
    rows = tables({"input_ids": torch.tensor([5, 6])})["input_ids"]
    optimizer.zero_grad()  # between forward and backward it must not make the ranks disagree
    if rank > 0:
        rows.sum().backward()
    optimizer.step()
    no_gradients = optimizer.reduce()
    optimizer.step()
    return exported(tables)["item"]["step"], no_gradients, optimizer.grad_norm


def lost_step(rank: int, world_size: int) -> Any:
    """Rank 0 drops a step that has gradients on the others."""
    tables = build()
    optimizer = OPTIMIZERS["sgd"](tables)
    tables({"input_ids": torch.tensor([5])})["input_ids"].sum().backward()
    if rank == 0:
        optimizer.zero_grad()
    return outcome(optimizer.step)


def statistics(rank: int, world_size: int) -> Any:
    """Every rank asks for the same ten ids three times in each of two micro-batches; the last rank asks for nothing."""
    tables = build().eval()
    ids = torch.arange(10).repeat(3)
    batch = {"input_ids": ids[:0] if rank == world_size - 1 else ids}
    return tables.prepare([batch, batch], insert=True).fetch().statistics


def reshard(rank: int, world_size: int) -> Any:
    """Rows that every rank loaded alike are dealt out; rows that differ are refused."""
    alike = DynamicEmbeddingCollection(TABLES, FEATURES, backend="naive")
    optimizer = OPTIMIZERS["adamw"](alike)
    fill(alike)
    alike.set_process_group(group())
    different = DynamicEmbeddingCollection(TABLES, FEATURES, backend="naive")
    different.eval().prepare([{"input_ids": torch.tensor([rank])}], insert=True)
    refused = outcome(lambda: different.set_process_group(group()))
    moved = outcome(lambda: alike.set_process_group(None))
    del optimizer
    return exported(alike), refused, moved


def sub_group(rank: int, world_size: int) -> Any:
    """Ranks 0 and 1 share tables; rank 2 has its own, and is not waited for."""
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    tables = DynamicEmbeddingCollection(
        TABLES, FEATURES, backend="naive", process_group=pair if rank < 2 else single
    ).eval()
    tables.prepare([{"input_ids": torch.arange(50)}], insert=True)
    return tables.num_rows(), tables.total_rows()


def exchange_units(rank: int, world_size: int) -> Any:
    exchange = Exchange(group())
    long = exchange.gather_ints(list(range(rank, rank + 100 * rank)))
    assert long == [list(range(r, r + 100 * r)) for r in range(world_size)]
    assert exchange.gather_ints([-(2**63), 2**63 - 1])[-1] == [-(2**63), 2**63 - 1]
    assert exchange.sum_int(rank) == world_size * (world_size - 1) // 2
    assert exchange.sum_float(0.5) == world_size / 2
    assert exchange.sum_tensor(torch.tensor([[rank, 1]])).tolist() == [[world_size * (world_size - 1) // 2, world_size]]
    assert exchange.swap_counts(torch.arange(world_size)[:, None] + 10 * rank).flatten().tolist() == [
        10 * r + rank for r in range(world_size)
    ]
    # Rank r sends r + d rows of part 0 (width 2) and one row of part 1 (no width) to each rank d.
    sent = torch.tensor([[rank + d, 1] for d in range(world_size)])
    received = torch.tensor([[r + rank, 1] for r in range(world_size)])
    marks = torch.tensor([float(10 * rank + d) for d in range(world_size)])
    parts = [marks.repeat_interleave(sent[:, 0])[:, None].repeat(1, 2), marks]
    first, second = exchange.swap(parts, sent, received)
    expected = torch.tensor([float(10 * r + rank) for r in range(world_size)])
    assert torch.equal(second, expected)
    assert torch.equal(first, expected.repeat_interleave(received[:, 0])[:, None].repeat(1, 2))
    empty = torch.zeros(world_size, 2, dtype=torch.int64)
    assert [p.shape for p in exchange.swap([torch.empty(0, 3), torch.empty(0)], empty, empty)] == [(0, 3), (0,)]
    assert exchange.bytes_sent > 0
    told = "zu lang: " + "ü" * 5000
    problem = ValueError(told) if rank == 0 else RuntimeError("other") if rank == world_size - 1 else None
    return [outcome(lambda: exchange.agree(problem)), outcome(lambda: exchange.agree(None))]


def damaged_shard(rank: int, world_size: int, folder: str) -> Any:
    """The last shard is cut short: every rank refuses, and keeps the rows it has."""
    if rank == 0:
        last = max(Path(folder).glob("*.safetensors"))
        os.truncate(last, last.stat().st_size - 100)
    dist.barrier()
    tables = build().eval()
    tables.prepare([{"input_ids": torch.tensor([4])}], insert=True)
    result = outcome(lambda: load_tables(tables, folder, state=False))
    return result, tables.total_rows()


def flipped_export(rank: int, world_size: int, folder: str) -> Any:
    """One bit of one file after the other is wrong, most of which several ranks read parts of."""
    outcomes = []
    for file in sorted(Path(folder).glob("*.safetensors")):
        content = file.read_bytes()
        dist.barrier()
        if rank == 0:
            at = len(content) - 9
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        dist.barrier()
        outcomes.append(outcome(lambda: load_tables(build().eval(), folder)))
        dist.barrier()
        if rank == 0:
            file.write_bytes(content)
    dist.barrier()
    return outcomes, outcome(lambda: load_tables(build().eval(), folder))


def run_jobs(rank: int, world_size: int, jobs: list[tuple[str, list[Any]]]) -> dict[str, Any]:
    """Run several jobs in one set of processes, since starting one costs seconds."""
    return {f"{name} {args}": globals()[name](rank, world_size, *args) for name, args in jobs}


def raise_on_one_rank(rank: int, world_size: int) -> None:
    if rank == 1:
        raise RuntimeError("nobody home")
    dist.barrier()


def backends_of_groups(rank: int, world_size: int) -> None:
    """A group with a backend for each kind of device: how torch spells it, also after DeepSpeed's new_group."""
    both = dist.new_group([0], backend="cpu:gloo,cuda:gloo")
    assert dist.get_backend(both) == "cpu:gloo,cuda:gloo"
    assert dist.get_backend_config(both) == dist.get_backend_config(group()) == "cpu:gloo,cuda:gloo"
    assert str(BackendConfig(Backend("nccl"))) == "cuda:nccl"
    assert str(BackendConfig(Backend("cpu:gloo,cuda:nccl"))) == "cpu:gloo,cuda:nccl"
