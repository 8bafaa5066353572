"""What `initialize` accepts as model and sparse side."""

from typing import Any

import pytest
import torch
from grzoo.embeddings import (
    DynamicEmbeddingCollection,
    FeatureConfig,
    SparseAdagrad,
    SparseAdamW,
    SparseRowwiseAdagrad,
    TableConfig,
)
from grzoo.embeddings.engine import initialize
from grzoo.embeddings.engine.sparse import build_scheduler, build_sparse_optimizer, find_collection
from torch import Tensor, nn


def tables() -> DynamicEmbeddingCollection:
    return DynamicEmbeddingCollection(
        [TableConfig(name="item", embedding_dim=4)], [FeatureConfig(name="ids", table="item")], backend="naive"
    )


class Model(nn.Module):
    def __init__(self, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)

    def embedding_ids(self, batch: Any) -> dict[str, Tensor]:
        return {"ids": batch["ids"]}


def test_finds_the_collection() -> None:
    collection = tables()
    assert find_collection(Model(embeddings=collection)) is collection


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(1, 1), "no DynamicEmbeddingCollection as `embeddings`"),
        (Model(other=tables()), "no DynamicEmbeddingCollection as `embeddings`"),
        (Model(embeddings=tables(), more=tables()), "2 collections"),
        (nn.ModuleDict(), "no DynamicEmbeddingCollection"),
    ],
)
def test_unusable_models(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        initialize(model=model, config={}, sparse_optimizer={"type": "SGD", "params": {"lr": 1.0}})


def test_model_without_embedding_ids() -> None:
    model = nn.Module()
    model.embeddings = tables()
    with pytest.raises(ValueError, match="no embedding_ids"):
        find_collection(model)


def test_sparse_optimizers() -> None:
    given = {"type": "RowwiseAdagrad", "params": {"lr": 0.5}}
    collection = tables()
    built = build_sparse_optimizer(given, collection)
    assert type(built) is SparseRowwiseAdagrad and built.param_groups[0]["lr"] == 0.5
    collection = tables()
    built = build_sparse_optimizer(lambda found: SparseAdamW(found, 0.1), collection)
    assert type(built) is SparseAdamW and build_sparse_optimizer(built, collection) is built


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "NoneType, and the tables would stay untrained"),
        ({"type": "Lion"}, "one of SGD, Adagrad, RowwiseAdagrad, Adam, AdamW"),
        ({"type": "SGD", "parameters": {"lr": 1.0}}, "give"),
        ({"type": "SGD", "params": {"lr": 1.0, "nesterov": True}}, "nesterov"),
        (lambda collection: torch.optim.SGD([torch.zeros(1)], 0.1), "is a SGD"),
        (SparseAdagrad(tables(), 0.1), "another collection"),
    ],
)
def test_unusable_sparse_optimizers(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_sparse_optimizer(given, tables())


def test_schedulers() -> None:
    collection = tables()
    optimizer = SparseAdagrad(collection, 1.0)
    scheduler = build_scheduler(lambda found: torch.optim.lr_scheduler.ExponentialLR(found, 0.5), optimizer)
    assert scheduler.optimizer is optimizer and build_scheduler(scheduler, optimizer) is scheduler
    assert build_scheduler(None, optimizer) is None
    with pytest.raises(ValueError, match="another optimizer"):
        build_scheduler(scheduler, SparseAdagrad(tables(), 1.0))
    with pytest.raises(ValueError, match="sparse_lr_scheduler is a str"):
        build_scheduler("cosine", optimizer)
