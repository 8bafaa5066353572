"""What the ranks of the feature tests run: pooled, jagged and weighted features, shared rows, pretrained rows."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from grzoo.embeddings import (
    DynamicEmbeddingCollection,
    FeatureConfig,
    Jagged,
    SparseAdagrad,
    TableConfig,
)
from grzoo.embeddings.io import load_tables, save_tables
from torch import Tensor

FEATURES = [
    FeatureConfig(name="input_ids", table="item"),
    FeatureConfig(name="basket", table="item", pooling="sum"),
    FeatureConfig(name="title", table="word", pooling="mean"),
    FeatureConfig(name="user", table="user"),
]
STEPS = 3
Batch = dict[str, Tensor | Jagged]


def build(vectors: str) -> DynamicEmbeddingCollection:
    uniform = {"kind": "uniform", "scale": 0.5}
    pretrained = {"kind": "pretrained", "file": vectors, "otherwise": uniform}
    tables = [
        TableConfig(name="item", embedding_dim=4, initializer=pretrained),
        TableConfig(name="word", embedding_dim=6, initializer=uniform, row_dtype="bfloat16"),
        TableConfig(name="user", embedding_dim=4, initializer=uniform, unknown="shared", admission={"min_count": 2}),
    ]
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    return DynamicEmbeddingCollection(tables, FEATURES, seed=3, backend="host", process_group=group)


def sample(step: int, i: int) -> Batch:
    """Sample i of a global batch: bags of 0 to 3 ids."""
    generator = torch.Generator().manual_seed(10 * step + i)
    draw = lambda n: torch.randint(-9, 9, (n,), generator=generator)  # noqa: E731
    lengths = torch.randint(0, 4, (3,), generator=generator)
    n = int(lengths.sum())
    weights = torch.rand(n, generator=generator) - 0.5
    return {
        "input_ids": draw(2),
        "basket": Jagged.from_lengths(draw(n), lengths, weights),
        "title": Jagged.from_lengths(draw(n), lengths),
        "user": draw(1),
    }


def join(samples: list[Batch]) -> Batch:
    joined: Batch = {}
    for name in [config.name for config in FEATURES]:
        parts = [s[name] for s in samples]
        if not parts:
            continue
        if not isinstance(parts[0], Jagged):
            joined[name] = torch.cat(parts)  # type: ignore[arg-type]
            continue
        lengths = torch.cat([p.offsets.diff() for p in parts])  # type: ignore[union-attr]
        weights = None if parts[0].weights is None else torch.cat([p.weights for p in parts])  # type: ignore[union-attr,misc]
        joined[name] = Jagged.from_lengths(torch.cat([p.values for p in parts]), lengths, weights)  # type: ignore[union-attr]
    return joined


def train(rank: int, world_size: int, vectors: str, folder: str) -> Any:
    """Train on six samples a step; odd users are known beforehand, even ones share a row. Then save and load."""
    tables = build(vectors)
    optimizer = SparseAdagrad(tables, lr=0.3, max_grad_norm=1.0)
    with torch.no_grad():
        tables(
            {
                "user": torch.arange(-9, 9, 2).repeat(2),
                "input_ids": torch.arange(-9, 9),
                "title": torch.arange(-9, 9)[None],
            }
        )
    norms = []
    for step in range(STEPS):
        mine = [sample(step, i) for i in range(6) if i * i % world_size == rank]
        batches = [join(mine[k::2]) for k in range(2)]
        prepared = tables.prepare(batches, insert=False).fetch()
        for k in range(2):
            losses = [(rows * (j + 1) + rows.square()).sum() for j, rows in enumerate(prepared[k].values())]
            if losses:
                (world_size * torch.stack(losses).sum()).backward()
        optimizer.step()
        norms.append(optimizer.grad_norm)
    save_tables(tables, folder, state=True)
    load_tables(tables, folder, state=True)
    rows = {name: {k: v.tolist() for k, v in tables.export_rows(name).items()} for name in tables.table_names}
    return {"rows": rows, "shared": {k: v.tolist() for k, v in tables.shared_row("user").items()}, "norms": norms}


def bad_input(rank: int, world_size: int, vectors: str) -> Any:
    """Only the last rank errs; what every rank raises."""
    tables = build(vectors).eval()
    good = Jagged(torch.tensor([1, 2]), torch.tensor([0, 2]))
    bad = [
        good._replace(values=torch.tensor([1.0, 2.0])),
        good._replace(offsets=torch.tensor([0, 1])),
        Jagged.from_lengths(good.values, torch.tensor([3, -1])),
        good._replace(weights=torch.tensor([1.0, torch.nan])),
    ]
    messages = []
    for given in bad:
        try:
            tables({"basket": given if rank == world_size - 1 else good})
        except ValueError as error:
            messages.append(str(error))
    tables({"basket": good})  # all are still in step
    return messages


def missing_vectors(rank: int, world_size: int, vectors: str) -> Any:
    """The file is missing on the last rank."""
    tables = build(vectors if rank < world_size - 1 else vectors + ".missing")
    tables._agreed = True  # the paths differ, which other ranks would refuse
    try:
        with torch.no_grad():
            tables({"input_ids": torch.arange(-9, 9)})
    except ValueError as error:
        return str(error)
    return None


def run(rank: int, world_size: int, vectors: str, folder: str) -> dict[str, Any]:
    jobs: dict[str, Callable[[], Any]] = {
        "train": lambda: train(rank, world_size, vectors, folder),
        "bad_input": lambda: bad_input(rank, world_size, vectors),
        "missing_vectors": lambda: missing_vectors(rank, world_size, vectors),
    }
    return {name: job() for name, job in jobs.items()}
