"""S18, S20, S23: N + M steps are N steps, a save, a load and M steps, bit for bit, for each optimizer and policy."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grzoo.embeddings import (
    DynamicEmbeddingCollection,
    FeatureConfig,
    SparseAdagrad,
    SparseAdam,
    SparseAdamW,
    SparseOptimizer,
    SparseRowwiseAdagrad,
    SparseSGD,
    TableConfig,
)
from grzoo.embeddings.io import load_tables, save_tables

OPTIMIZERS: dict[str, Callable[[DynamicEmbeddingCollection], SparseOptimizer]] = {
    "sgd": lambda tables: SparseSGD(tables, lr=0.1),
    "momentum": lambda tables: SparseSGD(tables, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda tables: SparseAdagrad(tables, lr=0.1, initial_accumulator_value=0.1),
    "rowwise_adagrad": lambda tables: SparseRowwiseAdagrad(tables, lr=0.1),
    "adam": lambda tables: SparseAdam(tables, lr=0.05),
    "adam, global step": lambda tables: SparseAdam(tables, lr=0.05, step_mode="global"),
    "adamw": lambda tables: SparseAdamW(tables, lr=0.05, weight_decay=0.1),
}
POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "admission and lru": {
        "max_rows": 30, "admission": {"min_count": 2, "forget_after": 4}, "eviction": {"kind": "lru", "every": 3},
    },
    "lfu": {"max_rows": 30, "eviction": {"kind": "lfu", "every": 2, "half_life": 4}},
    "ttl": {"eviction": {"kind": "ttl", "every": 2, "steps": 3}},
}  # fmt: skip
ROWS = ["float32", "bfloat16"]
CASES = [
    (optimizer, dtype, policies)
    for optimizer, dtype, policies in itertools.product(OPTIMIZERS, ROWS, POLICIES)
    if policies == "none" or optimizer in ("adam, global step", "rowwise_adagrad")
]


def build(dtype: str, policies: dict[str, Any]) -> DynamicEmbeddingCollection:
    item = TableConfig(name="item", embedding_dim=5, row_dtype=dtype, **policies)
    tables = [item, TableConfig(name="user", embedding_dim=5, row_dtype=dtype)]
    return DynamicEmbeddingCollection(tables, [FeatureConfig(name=t.name, table=t.name) for t in tables], seed=3)


def train(tables: DynamicEmbeddingCollection, optimizer: SparseOptimizer, first: int, end: int) -> list[float]:
    losses = []
    for step in range(first, end):
        generator = torch.Generator().manual_seed(step)
        ids = {t: torch.randint(0, 25 + 5 * step, (20,), generator=generator) * 7919 - 40 for t in ("item", "user")}
        rows = tables(ids)
        loss = sum((rows[t] - torch.rand(5, generator=generator)).square().sum() for t in rows)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def everything(tables: DynamicEmbeddingCollection) -> dict[str, Any]:
    found: dict[str, Any] = {name: tables.export_rows(name) for name in tables.table_names}
    return found | {f"log of {name}": list(tables.drain_evicted(name)) for name in tables.table_names}


@pytest.mark.parametrize(("optimizer", "dtype", "policies"), CASES)
def test_s23_resume_is_never_stopped(tmp_path: Path, optimizer: str, dtype: str, policies: str) -> None:
    tables = build(dtype, POLICIES[policies])
    attached = OPTIMIZERS[optimizer](tables)
    train(tables, attached, 0, 5)
    save_tables(tables, tmp_path, state=True)
    state = json.dumps(attached.state_dict())
    losses = train(tables, attached, 5, 12)

    other = build(dtype, POLICIES[policies])
    resumed = OPTIMIZERS[optimizer](other)
    train(other, resumed, 30, 33)  # whatever it has learnt by now must go
    load_tables(other, tmp_path, state=True)
    resumed.load_state_dict(json.loads(state))
    assert train(other, resumed, 5, 12) == losses
    torch.testing.assert_close(everything(other), everything(tables), rtol=0, atol=0)
    if policies != "none":
        assert 0 < tables.num_rows("item") < tables.num_rows("user"), "the policy has done nothing"


@pytest.mark.parametrize("reached", ["prepared", "backward"])
def test_s20_a_step_that_is_not_applied_yet_does_not_leak_into_a_checkpoint(tmp_path: Path, reached: str) -> None:
    """Its new rows and counts would be there again when the resumed run comes to it."""
    tables = build("float32", POLICIES["admission and lru"])
    optimizer = OPTIMIZERS["adam"](tables)
    train(tables, optimizer, 0, 2)
    save_tables(tables, tmp_path / "before", state=True)
    ids = torch.arange(1000, 1010).repeat(2)
    step = tables.prepare([{"item": ids}])
    if reached == "backward":
        step.fetch()[0]["item"].sum().backward()
    with pytest.raises(ValueError, match="prepared for training and not applied.*save after optimizer.step()"):
        save_tables(tables, tmp_path / "between", state=True)
    assert not (tmp_path / "between").exists()
    save_tables(tables, tmp_path / "export", state=False)  # an export has no counters
    if reached == "prepared":
        step.fetch()[0]["item"].sum().backward()
    optimizer.step()
    save_tables(tables, tmp_path / "after", state=True)
    assert (tmp_path / "before").exists() and (tmp_path / "after").exists()
