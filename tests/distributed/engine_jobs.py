"""What the ranks of the engine's tests run: a micro HSTU through the engine, or in a plain torch loop."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grzoo.data.collator import GenRecCollator, GlobalStep
from grzoo.data.dataset import EventDataset
from grzoo.data.loader import StepLoader
from grzoo.data.negatives import SharedNegatives, UniformNegatives
from grzoo.data.sampler import GlobalBatchSampler
from grzoo.embeddings import (
    SparseAdagrad,
    SparseAdam,
    SparseAdamW,
    SparseOptimizer,
    SparseRowwiseAdagrad,
    SparseSGD,
)
from grzoo.models import HSTUConfig, HSTUForRetrieval

USERS, ITEMS, GLOBAL_BATCH, MAX_LENGTH = 40, 90, 12, 20
SPARSE: dict[str, Callable[..., SparseOptimizer]] = {
    "AdamW": SparseAdamW,
    "Adam": SparseAdam,
    "Adagrad": SparseAdagrad,
    "RowwiseAdagrad": SparseRowwiseAdagrad,
    "SGD": SparseSGD,
}
DENSE = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "Adagrad": torch.optim.Adagrad, "SGD": torch.optim.SGD}


@dataclass(frozen=True)
class Recipe:
    """What must decide the result: everything here, and nothing of `Layout`."""

    dense: tuple[str, dict[str, Any]] = ("AdamW", {"lr": 2e-3, "eps": 1e-6})
    sparse: tuple[str, dict[str, Any]] = ("AdamW", {"lr": 5e-3, "eps": 1e-6})
    negatives: str = "uniform"
    clipping: float = 0.0
    steps: int = 20
    seed: int = 7


@dataclass(frozen=True)
class Layout:
    """What must not decide it."""

    world_size: int = 1
    stage: int = 1
    micro_batches: int = 1
    dtype: str = "fp32"
    repeat: int = 0  # a number that only distinguishes equal runs


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    sparse_grad_norms: list[float] = field(default_factory=list)
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[int, torch.Tensor] = field(default_factory=dict)  # id -> row


def build_dataset() -> EventDataset:
    """Users of very different lengths, among them one with two events."""
    generator = np.random.default_rng(3)
    lengths = np.concatenate([[2], generator.integers(3, 30, USERS - 1)])
    items = np.minimum(generator.zipf(1.3, lengths.sum()), ITEMS) * 7919 - 3  # some ids far apart, none contiguous
    times = np.concatenate([np.sort(generator.integers(0, 10**7, n)) for n in lengths])
    return EventDataset.from_arrays({"item_id": items.astype(np.int64), "timestamp": times}, lengths)


def build_steps(recipe: Recipe, layout: Layout, rank: int) -> StepLoader:
    dataset = build_dataset()
    ids, counts = np.unique(dataset._columns["item_id"], return_counts=True)
    negatives: Any = UniformNegatives(ids, 6) if recipe.negatives == "uniform" else SharedNegatives(ids, counts, 24)
    collator = GenRecCollator(dataset, max_length=MAX_LENGTH, seed=recipe.seed, negatives=negatives)
    return StepLoader(
        dataset,
        GlobalBatchSampler(len(dataset), GLOBAL_BATCH, seed=recipe.seed),
        collator,
        world_size=layout.world_size,
        rank=rank,
        micro_batches=layout.micro_batches,
    )


def step_at(loader: StepLoader, number: int) -> GlobalStep:
    per_epoch = -(-USERS // GLOBAL_BATCH)
    epoch, within = divmod(number, per_epoch)
    return loader.step_at(epoch, within * GLOBAL_BATCH)


def build_model(recipe: Recipe, **changes: Any) -> HSTUForRetrieval:
    torch.manual_seed(recipe.seed)
    config = HSTUConfig(
        hidden_size=11,  # odd: parameters that ranks do not divide
        attention_head_dim=6,
        linear_head_dim=5,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_sequence_length=MAX_LENGTH,
        max_position_embeddings=MAX_LENGTH + 3,
        negative_sampling=recipe.negatives,
        num_negatives=6 if recipe.negatives == "uniform" else 24,
        hidden_dropout=0.2,
        temperature=0.2,
        embedding_seed=recipe.seed,
        **changes,
    )
    return HSTUForRetrieval(config)


def deepspeed_config(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    name, params = recipe.dense
    return {
        "zero_optimization": {"stage": layout.stage, "stage3_param_persistence_threshold": 30},
        "bf16": {"enabled": layout.dtype == "bf16"},
        "gradient_clipping": recipe.clipping,
        "optimizer": {"type": name, "params": dict(params)},
    }


def sparse_optimizer(recipe: Recipe) -> Callable[..., SparseOptimizer]:
    name, params = recipe.sparse
    return lambda collection: SPARSE[name](collection, **params, max_grad_norm=recipe.clipping)


def build_engine(recipe: Recipe, layout: Layout, **arguments: Any) -> Any:
    from grzoo.embeddings.engine import initialize

    arguments = {"model": build_model(recipe), "sparse_optimizer": sparse_optimizer(recipe)} | arguments
    engine, _, _, _ = initialize(config=deepspeed_config(recipe, layout), **arguments)
    return engine


def plain_loop(recipe: Recipe) -> Result:
    """The same training without DeepSpeed, ranks or micro-batches: plain torch."""
    model, loader, result = build_model(recipe), build_steps(recipe, Layout(), 0), Result()
    dense = DENSE[recipe.dense[0]](model.parameters(), **recipe.dense[1])
    sparse = sparse_optimizer(recipe)(model.embeddings)
    model.train()
    for number in range(recipe.steps):
        step = step_at(loader, number)
        (micro_batch,) = step.micro_batches
        loss = model(**micro_batch, num_items_in_batch=step.num_items_in_batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clipping or float("inf"))
        dense.step()
        sparse.step()
        dense.zero_grad()
        sparse.zero_grad()
        result.losses.append(loss.item())
        result.grad_norms.append(float(norm))
        result.sparse_grad_norms.append(sparse.grad_norm)
    result.dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    result.rows = rows_of(model.embeddings)
    return result


def train(engine: Any, loader: StepLoader, first: int, last: int, result: Result | None = None) -> Result:
    result = result or Result()
    for number in range(first, last):
        output = engine.train_batch(step_at(loader, number))
        assert output.applied
        result.losses.append(output.loss)
        result.grad_norms.append(output.grad_norm)
        result.sparse_grad_norms.append(output.sparse_grad_norm)
    return result


def finish(engine: Any, result: Result) -> Result:
    """Collects the dense weights and this rank's rows. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    result.dense = {n: safe_get_full_fp32_param(p).clone() for n, p in engine.module.named_parameters()}
    result.rows = rows_of(engine.collection)
    return result


def engine_loop(recipe: Recipe, layout: Layout, rank: int) -> Result:
    engine = build_engine(recipe, layout)
    result = finish(engine, train(engine, build_steps(recipe, layout, rank), 0, recipe.steps))
    engine.destroy()
    return result


def rows_of(collection: Any) -> dict[int, torch.Tensor]:
    exported = collection.export_rows("items")
    return dict(zip(exported["ids"].tolist(), exported["rows"], strict=True))


def save_result(result: Result, path: Path) -> None:
    """A rank's result as safetensors."""
    from safetensors.torch import save_file

    ids = list(result.rows)
    tensors = {f"dense.{name}": value.contiguous() for name, value in result.dense.items()}
    tensors["ids"] = torch.tensor(ids, dtype=torch.int64)
    if ids:
        tensors["rows"] = torch.stack([result.rows[i] for i in ids])
    series = {"losses": result.losses, "grad_norms": result.grad_norms, "sparse_grad_norms": result.sparse_grad_norms}
    save_file(tensors, path, metadata={"series": json.dumps(series)})


def load_result(paths: list[Path]) -> Result:
    """The results of all ranks as one; series and dense weights must be the same on all."""
    from safetensors import safe_open

    result = Result()
    for path in paths:
        with safe_open(path, "pt") as file:
            series = json.loads(file.metadata()["series"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        dense = {name.removeprefix("dense."): value for name, value in tensors.items() if name.startswith("dense.")}
        if path != paths[0]:
            assert series["losses"] == result.losses
            assert all(torch.equal(dense[name], result.dense[name]) for name in dense)
        result.losses, result.grad_norms = series["losses"], series["grad_norms"]
        result.sparse_grad_norms, result.dense = series["sparse_grad_norms"], dense
        ids = tensors["ids"].tolist()
        assert not result.rows.keys() & set(ids), "two ranks own an id"
        result.rows |= dict(zip(ids, tensors.get("rows", ()), strict=True))
    return result
