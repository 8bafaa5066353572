"""The sparse side of `initialize`: the collection of a model, its optimizer, its scheduler."""

from collections.abc import Callable, Mapping
from typing import Any

import grzoo.embeddings.optimizers as optimizers
from grzoo.embeddings.collection import DynamicEmbeddingCollection
from grzoo.embeddings.optimizers import SparseOptimizer
from torch import nn

OPTIMIZERS: dict[str, type[SparseOptimizer]] = {
    "SGD": optimizers.SparseSGD,
    "Adagrad": optimizers.SparseAdagrad,
    "RowwiseAdagrad": optimizers.SparseRowwiseAdagrad,
    "Adam": optimizers.SparseAdam,
    "AdamW": optimizers.SparseAdamW,
}


def find_collection(model: nn.Module) -> DynamicEmbeddingCollection:
    """The model's only collection of tables, `model.embeddings`.

    Raises:
        ValueError: the model has no tables, several collections, or does not say which ids a micro-batch looks up.
    """
    found = [module for module in model.modules() if isinstance(module, DynamicEmbeddingCollection)]
    collection = getattr(model, "embeddings", None)
    if not found or not isinstance(collection, DynamicEmbeddingCollection):
        raise ValueError(
            f"{type(model).__name__} has no DynamicEmbeddingCollection as `embeddings`: give it one, or train a model "
            "without tables by deepspeed.initialize"
        )
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} collections: the engine trains one, and tables of different "
            "features can share it"
        )
    if not callable(getattr(model, "embedding_ids", None)):
        raise ValueError(f"{type(model).__name__} has no embedding_ids(micro_batch) -> {{feature: ids}}: add it")
    return collection


def build_sparse_optimizer(
    given: SparseOptimizer | Callable[[DynamicEmbeddingCollection], SparseOptimizer] | Mapping[str, Any] | None,
    collection: DynamicEmbeddingCollection,
) -> SparseOptimizer:
    """An optimizer of `collection` from what `initialize` was given. Raises ValueError for anything else."""
    if isinstance(given, Mapping):
        given = _from_dict(given, collection)
    elif callable(given) and not isinstance(given, SparseOptimizer):
        given = given(collection)
    if not isinstance(given, SparseOptimizer):
        raise ValueError(
            f"sparse_optimizer is a {type(given).__name__}, and the tables would stay untrained: pass a sparse "
            'optimizer of grzoo.embeddings, a callable that makes one, or {"type": "AdamW", "params": {"lr": 0.001}}'
        )
    if given.collection is not collection:
        raise ValueError("sparse_optimizer belongs to another collection: make it from model.embeddings")
    return given


def _from_dict(given: Mapping[str, Any], collection: DynamicEmbeddingCollection) -> SparseOptimizer:
    unknown = sorted(set(given) - {"type", "params"})
    if unknown or given.get("type") not in OPTIMIZERS:
        raise ValueError(
            f'sparse_optimizer is {dict(given)!r}: give {{"type": one of {", ".join(OPTIMIZERS)}, "params": {{...}}}}'
        )
    try:
        return OPTIMIZERS[given["type"]](collection, **given.get("params", {}))
    except TypeError as error:
        raise ValueError(f"sparse_optimizer params {given.get('params')!r}: {error}") from error


def build_scheduler(given: Any, optimizer: SparseOptimizer) -> Any:
    """A scheduler of `optimizer`: the given one, or what a callable makes of the optimizer, or None."""
    if given is None or hasattr(given, "step"):
        if given is not None and getattr(given, "optimizer", optimizer) is not optimizer:
            raise ValueError("sparse_lr_scheduler belongs to another optimizer: make it from the sparse one")
        return given
    if not callable(given):
        raise ValueError(f"sparse_lr_scheduler is a {type(given).__name__}: pass a torch scheduler or a callable")
    return given(optimizer)
