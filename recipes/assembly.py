"""Builds the parts of a training run from its settings: model, batches, engine."""

import dataclasses
from functools import partial
from typing import Any

import torch
from grzoo.data import (
    AllItems,
    Catalogue,
    EventDataset,
    GenRecCollator,
    GlobalBatchSampler,
    RecentFirst,
    SharedNegatives,
    SlidingWindows,
    StepLoader,
    StochasticLength,
    UniformNegatives,
)
from grzoo.data.windows import WindowPolicy
from grzoo.embeddings import (
    DynamicEmbeddingCollection,
    SparseAdagrad,
    SparseAdam,
    SparseAdamW,
    SparseOptimizer,
    SparseRowwiseAdagrad,
    SparseSGD,
)
from grzoo.embeddings.engine import GenRecEngine, initialize
from grzoo.embeddings.engine.config import EngineConfig
from grzoo.models import AutoModelForRetrieval
from transformers import PreTrainedConfig, get_scheduler
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .arguments import DataArguments, OptimizerArguments, StepArguments
from .dataset_folder import LoadedData
from .parsing import build_config
from .runtime import Runtime, UserError, user_errors
from .settings import Settings

PADDED_POSITIONS = 11  # the paper sizes its position tables for max_length + 11 (reserved places)
_OWNED = {
    "max_sequence_length": "--max_length",
    "negative_sampling": "--negative_sampling",
    "num_negatives": "--num_negatives",
    "embedding_seed": "--seed",
}


def build_model_config(settings: Settings, *, has_timestamps: bool, num_items: int) -> PreTrainedConfig:
    """The model's configuration: `model:` settings, completed by what the recipe and the data decide.

    Raises:
        UserError: unknown model type or hyperparameter, or one that has its own flag.
    """
    options = dict(settings.model_options)
    model_type = options.pop("model_type", "hstu")
    retrieval = [name for name in CONFIG_MAPPING if CONFIG_MAPPING[name].__module__.startswith("grzoo.")]
    if model_type not in retrieval:
        raise UserError(f"no model_type {model_type!r}; there is {', '.join(retrieval)}")
    for name, flag in _OWNED.items():
        if name in options:
            raise UserError(f"set {flag} instead of model.{name}: the batches follow it too")
    max_length = settings.data.max_length
    decided = {
        "max_sequence_length": max_length,
        "max_position_embeddings": max_length + PADDED_POSITIONS,
        "negative_sampling": settings.step.negative_sampling,
        "num_negatives": num_items if settings.step.negative_sampling == "all" else settings.step.num_negatives,
        "num_items": num_items,
        "embedding_seed": settings.training.seed,
        "use_time_bias": has_timestamps,
    }
    if options.get("use_time_bias") and not has_timestamps:
        raise UserError("model.use_time_bias is true, but the events of this data set have no timestamps: remove it")
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)}
    decided = {name: value for name, value in decided.items() if name in known}
    config: PreTrainedConfig = build_config(config_class, {**decided, **options})
    return config


def build_model(settings: Settings, config: PreTrainedConfig) -> Any:
    """A new model, equal on all ranks."""
    torch.manual_seed(settings.training.seed)
    with user_errors():
        return AutoModelForRetrieval.from_config(config, embedding_backend=settings.step.backend)


def build_loader(settings: Settings, data: LoadedData, config: Any, runtime: Runtime) -> StepLoader:
    """The balanced global steps of this rank.

    Raises:
        UserError: an empty split or catalogue, or a token budget below the longest history.
    """
    step = settings.step
    with user_errors():
        collator = build_collator(settings, data.train, data.catalogue)
        sampler = GlobalBatchSampler(
            len(collator.windows),
            step.global_batch_size,
            seed=settings.training.seed,
            block_size=settings.data.shuffle_block_size,
        )
        return StepLoader(
            data.train,
            sampler,
            collator,
            world_size=runtime.world_size,
            rank=runtime.rank,
            cost=config.flops,
            max_tokens_per_device=step.max_tokens_per_device,
            micro_batches=step.micro_batches,
            **worker_options(settings),
        )


def worker_options(settings: Settings) -> dict[str, Any]:
    """How batches are built and kept, in the arguments of StepLoader."""
    data = settings.data
    return {
        "num_workers": data.dataloader_num_workers,
        "prefetch_factor": data.dataloader_prefetch_factor or 2,
        "pin_memory": data.dataloader_pin_memory and not settings.common.use_cpu and torch.cuda.is_available(),
    }


def build_collator(settings: Settings, dataset: EventDataset, catalogue: Catalogue) -> GenRecCollator:
    """Windows, keys and negatives of the settings, over a data set."""
    seed = settings.training.seed
    return GenRecCollator(
        dataset,
        max_length=settings.data.max_length,
        seed=seed,
        negatives=_negatives(settings.step, catalogue),
        windows=window_policy(settings.data, seed),
    )


def window_policy(arguments: DataArguments, seed: int) -> WindowPolicy:
    """How histories are cut into training samples, as `--windows` says."""
    if arguments.windows == "sliding":
        return partial(SlidingWindows, overlap=arguments.window_overlap)
    if arguments.windows == "stochastic":
        return partial(StochasticLength, alpha=arguments.stochastic_alpha, seed=seed)
    return RecentFirst


def _negatives(step: StepArguments, catalogue: Catalogue) -> UniformNegatives | SharedNegatives | AllItems:
    if step.negative_sampling == "all":
        return catalogue.all_items()
    if step.negative_sampling == "shared":
        return catalogue.shared_negatives(step.num_negatives)
    return catalogue.uniform_negatives(step.num_negatives)


def build_engine(settings: Settings, model: Any, deepspeed: EngineConfig, total_steps: int) -> GenRecEngine:
    """DeepSpeed for the dense parameters, a sparse optimizer for the tables, one schedule for both."""
    optimizer = settings.optimizer

    def schedule(of: torch.optim.Optimizer) -> Any:
        return get_scheduler(
            optimizer.lr_scheduler_type, of, num_warmup_steps=optimizer.warmup_steps, num_training_steps=total_steps
        )

    with user_errors():
        engine, _, _, _ = initialize(
            model=model,
            config=deepspeed.deepspeed,
            sparse_optimizer=lambda collection: build_sparse_optimizer(collection, optimizer),
            lr_scheduler=schedule,
            sparse_lr_scheduler=schedule,
        )
    return engine


def build_sparse_optimizer(collection: DynamicEmbeddingCollection, arguments: OptimizerArguments) -> SparseOptimizer:
    """The optimizer of the tables that `--sparse_optimizer` names."""
    lr, norm, decay = arguments.table_learning_rate, arguments.max_grad_norm, arguments.sparse_weight_decay
    if arguments.sparse_optimizer == "sgd":
        return SparseSGD(collection, lr, weight_decay=decay, max_grad_norm=norm)
    if arguments.sparse_optimizer == "adagrad":
        return SparseAdagrad(collection, lr, max_grad_norm=norm)
    if arguments.sparse_optimizer == "rowwise_adagrad":
        return SparseRowwiseAdagrad(collection, lr, max_grad_norm=norm)
    betas, eps = (arguments.adam_beta1, arguments.adam_beta2), arguments.adam_epsilon
    kind = SparseAdamW if arguments.sparse_optimizer == "adamw" else SparseAdam
    return kind(collection, lr, betas=betas, eps=eps, weight_decay=decay, max_grad_norm=norm)
