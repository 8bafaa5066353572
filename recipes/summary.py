"""What a run chose: printed at its start, and the conditions of its report and model card."""

from typing import Any

import numpy as np
import torch
from grzoo.models.ranking import RankingConfig

from .dataset_folder import LoadedData
from .runtime import Runtime
from .settings import Settings


def describe(settings: Settings, data: LoadedData, engine: Any, total_steps: int, runtime: Runtime) -> dict[str, str]:
    """Name -> text of everything that decides what the run computes and how fast.

    Args:
        total_steps: optimizer steps of the run; 0 where it has no known end.
    """
    model, step, optimizer = engine.module, settings.step, settings.optimizer
    return {
        "model": f"{type(model).__name__}, {_dense_parameters(model):,} dense parameters, "
        f"{_flops_per_user(data, model, settings) / 1e6:,.1f} MFLOP forward per user (mean)",
        "tables": "; ".join(
            f"{name}: {table.embedding_dim} columns, rows inserted as ids appear"
            for name, table in engine.collection.tables.items()
        ),
        "data": f"{data.schema.name}: {len(data.train):,} users, {len(data.catalogue):,} items, "
        f"{data.train.num_events:,} training events, evaluated on {data.evaluation_split}",
        "ranks": f"{runtime.world_size} on {_device_name(engine.device)}, ZeRO stage {engine.config.stage}, "
        f"{engine.config.dtype}, table kernels {_backends(engine)}",
        "step": f"{step.global_batch_size} users over all ranks, {_budget(step)}, "
        f"{_labels(settings, model)}" + (f", {total_steps:,} steps" if total_steps else ""),
        "optimizers": f"dense adamw lr {optimizer.learning_rate:g}, tables {optimizer.sparse_optimizer} lr "
        f"{optimizer.table_learning_rate:g}, schedule {optimizer.lr_scheduler_type}, "
        f"clipping {optimizer.max_grad_norm or 'off'}, seed {settings.training.seed}",
    }


def _dense_parameters(model: Any) -> int:
    return sum(int(np.prod(getattr(p, "ds_shape", p.shape))) for p in model.parameters())


def _flops_per_user(data: LoadedData, model: Any, settings: Settings) -> float:
    lengths = np.minimum(np.maximum(data.train.lengths - 1, 0), settings.data.max_length)
    return float(np.mean(model.flops(lengths)))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads each)"


def _backends(engine: Any) -> str:
    """The kernels that the tables really use."""
    return ", ".join(sorted({table.backend.name for table in engine.collection.physical}))


def _labels(settings: Settings, model: Any) -> str:
    """Negatives of a retrieval model, candidates of a ranking model."""
    if isinstance(model.config, RankingConfig):
        return (
            f"at most {settings.data.max_candidates} exposures of a user, tasks {', '.join(model.config.tasks or [])}"
        )
    if settings.step.negative_sampling == "all":
        return "all items as negatives"
    return f"{settings.step.num_negatives} {settings.step.negative_sampling} negatives"


def _budget(step: Any) -> str:
    if step.micro_batches:
        return f"{step.micro_batches} micro-batches"
    if step.max_tokens_per_device:
        return f"as many micro-batches as keep within {step.max_tokens_per_device:,} tokens per device"
    return "1 micro-batch"
