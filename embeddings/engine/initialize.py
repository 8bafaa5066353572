"""`initialize`: a model with tables and a DeepSpeed configuration -> one engine for both sides."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from grzoo.embeddings.collection import DynamicEmbeddingCollection
from grzoo.embeddings.optimizers import SparseOptimizer
from torch import nn

from .config import EngineConfig, resolve_config
from .engine import GenRecEngine
from .runtime import open_process_group
from .sparse import build_scheduler, build_sparse_optimizer, find_collection

logger = logging.getLogger(__name__)


def initialize(
    *,
    model: nn.Module,
    config: Mapping[str, Any] | str | Path,
    sparse_optimizer: SparseOptimizer | Callable[[DynamicEmbeddingCollection], SparseOptimizer] | Mapping[str, Any],
    optimizer: Any | None = None,
    model_parameters: Iterable[Any] | None = None,
    lr_scheduler: Any | None = None,
    sparse_lr_scheduler: Any | None = None,
    training_data: Any | None = None,
    collate_fn: Callable[..., Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    dist_init_required: bool | None = None,
) -> tuple[GenRecEngine, Any, Any, Any]:
    """Makes the engine that trains `model`: DeepSpeed its parameters, `sparse_optimizer` the rows of its tables.

    To be called on every rank, under `deepspeed`, `torchrun` or plain `python` (one rank).

    Args:
        model: has `embeddings` (a DynamicEmbeddingCollection), `embedding_ids(micro_batch)` and a forward that takes
            `embeddings=` and `num_items_in_batch=` and returns an object with `.loss`.
        config: DeepSpeed configuration, a dictionary or the path of a JSON file: ZeRO 1, 2 or 3 in fp32 or bf16.
        sparse_optimizer: an optimizer of `model.embeddings`, a callable that makes one from the collection, or
            {"type": "AdamW", "params": {"lr": 1e-3}} with the name of an optimizer of grzoo.embeddings.
        optimizer: torch optimizer of the dense parameters, or a callable that makes one from them; default: the
            "optimizer" section of `config`.
        model_parameters: dense parameters or parameter groups; default: all that require gradients.
        lr_scheduler: torch scheduler of the dense optimizer, or a callable that makes one from it; default: the
            "scheduler" section of `config`.
        sparse_lr_scheduler: scheduler of the sparse optimizer, or a callable that makes one from it.
        training_data: map-style data set for DeepSpeed's own loader, which knows nothing of balancing.
        collate_fn: for that loader.
        process_group: ranks that share the tables; default: DeepSpeed's data-parallel group.
        dist_init_required: as in DeepSpeed.

    Returns: (engine, optimizer, dataloader, lr_scheduler), as `deepspeed.initialize`.

    Raises:
        ValueError: for a configuration, model or optimizer that the engine cannot train, naming the remedy.

    Example:
        >>> engine, _, _, _ = initialize(
        ...     model=model, config="zero1.json", sparse_optimizer={"type": "AdamW", "params": {"lr": 1e-3}}
        ... )  # doctest: +SKIP
        >>> for global_step in loader:  # doctest: +SKIP
        ...     print(engine.train_batch(global_step).loss)
    """
    collection = find_collection(model)
    if model_parameters is None:
        model_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if callable(optimizer):
        optimizer = optimizer(model_parameters)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}: pass a torch optimizer or a callable that makes one"
        )
    open_process_group(dist_init_required)
    world_size = dist.get_world_size()
    resolved = resolve_config(
        config,
        world_size=world_size,
        optimizer=None if optimizer is None else type(optimizer).__name__,
        has_scheduler=lr_scheduler is not None,
    )
    _say(resolved)

    import deepspeed

    deepspeed_engine, zero_optimizer, dataloader, scheduler = deepspeed.initialize(
        model=model,
        config=resolved.deepspeed,
        optimizer=optimizer,
        model_parameters=model_parameters,
        lr_scheduler=lr_scheduler,
        training_data=training_data,
        collate_fn=collate_fn,
    )
    _check_scheduler(scheduler, zero_optimizer)
    _check_device(collection, torch.device(deepspeed_engine.device))
    _join_group(collection, process_group, deepspeed_engine, world_size)
    sparse = build_sparse_optimizer(sparse_optimizer, collection)
    engine = GenRecEngine(
        deepspeed=deepspeed_engine,
        config=resolved,
        collection=collection,
        sparse_optimizer=sparse,
        sparse_lr_scheduler=build_scheduler(sparse_lr_scheduler, sparse),
    )
    return engine, zero_optimizer, dataloader, scheduler


def _say(config: EngineConfig) -> None:
    if dist.get_rank() == 0:
        for note in config.notes:
            logger.warning("%s", note)


def _check_scheduler(scheduler: Any, zero_optimizer: Any) -> None:
    """DeepSpeed replaces an Adagrad by a new one, and a scheduler of the old one changes nothing."""
    target = getattr(scheduler, "optimizer", None)
    if target is not None and target is not zero_optimizer and target.param_groups is not zero_optimizer.param_groups:
        raise ValueError(
            f"{type(scheduler).__name__} would not reach the dense optimizer, which DeepSpeed has replaced under ZeRO: "
            'use the "scheduler" section of the configuration, or AdamW instead of Adagrad'
        )


def _check_device(collection: DynamicEmbeddingCollection, device: torch.device) -> None:
    """Tables that hold rows already must be on the GPU of this rank: those of all ranks would fill the first one."""
    for table in collection.physical:
        if len(table) and table.device.type != "cpu" and table.device != device:
            raise ValueError(
                f"tables {[config.name for config in table.configs]} are on {table.device} and this rank trains on "
                f"{device}: call torch.cuda.set_device(int(os.environ['LOCAL_RANK'])) before rows are loaded"
            )


def _join_group(
    collection: DynamicEmbeddingCollection, group: dist.ProcessGroup | None, engine: Any, world_size: int
) -> None:
    """Spreads the tables over the data-parallel ranks, unless the collection has its group already."""
    if group is None and collection.process_group is None and world_size > 1:
        group = engine.data_parallel_group
    if group is not None and group is not collection.process_group:
        collection.set_process_group(group)
    if collection.exchange.world_size != world_size:
        raise ValueError(
            f"the tables are spread over {collection.exchange.world_size} ranks, but {world_size} ranks train: "
            "leave process_group unset, or give a group of all data-parallel ranks"
        )
