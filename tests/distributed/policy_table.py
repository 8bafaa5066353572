"""A collection of one table, "a", for the tests of policies."""

from typing import Any

import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseAdam, TableConfig
from torch import Tensor


def build(backend: str = "naive", **policies: Any) -> tuple[DynamicEmbeddingCollection, SparseAdam]:
    init = {"kind": "constant", "value": 1.0}
    tables = [TableConfig(name="a", embedding_dim=3, initializer=init, **policies)]
    collection = DynamicEmbeddingCollection(tables, [FeatureConfig(name="f", table="a")], backend=backend)
    return collection, SparseAdam(collection, lr=0.1)


def train(collection: DynamicEmbeddingCollection, optimizer: SparseAdam, *batches: list[int]) -> Tensor:
    """One step over micro-batches; returns the rows of the first."""
    step = collection.prepare([{"f": torch.tensor(ids, dtype=torch.int64)} for ids in batches]).fetch()
    for k in range(len(batches)):
        step[k]["f"].sum().backward()
    optimizer.step()
    return step[0]["f"].detach()


def candidates(collection: DynamicEmbeddingCollection) -> dict[int, int]:
    side = collection.physical[0].side.get("candidates")
    if side is None:
        return {}
    ids, handles = side.sorted_keys(0)
    return dict(zip(ids.tolist(), side.read(handles)["count"].tolist(), strict=True))


def use(collection: DynamicEmbeddingCollection) -> dict[int, tuple[int, int]]:
    """id -> (last use, count)."""
    rows = collection.export_rows("a")
    columns = (rows[name].tolist() for name in ("ids", "last_use", "count"))
    return {i: (last, count) for i, last, count in zip(*columns, strict=True)}
