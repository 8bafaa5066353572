"""Sparse optimizers against torch's own, and S9, S11, S12, S14, S15: the optimizer is apart from backward."""

import json
import math
from collections.abc import Callable
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
from torch import Tensor, nn

ROWS, DIM = 12, 5
Make = Callable[[DynamicEmbeddingCollection], SparseOptimizer]


def build(unknown: str = "zeros") -> DynamicEmbeddingCollection:
    tables = [
        TableConfig(name="item", embedding_dim=DIM, initializer={"kind": "normal", "std": 1.0}, unknown=unknown),
        TableConfig(name="user", embedding_dim=DIM),
    ]
    features = [FeatureConfig(name="a", table="item"), FeatureConfig(name="b", table="user")]
    return DynamicEmbeddingCollection(tables, features, backend="naive")


def rows_of(tables: DynamicEmbeddingCollection, table: str = "item") -> Tensor:
    """Rows by ascending id."""
    values = tables.export_rows(table)
    return values["rows"][values["ids"].argsort()]


def target(step: int) -> Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(step))


def train(make: Make, steps: int = 6) -> tuple[Tensor, Tensor]:
    """Rows before and after steps that touch every row."""
    tables = build()
    optimizer = make(tables)
    with torch.no_grad():
        first = tables({"a": torch.arange(ROWS)})["a"]
    for step in range(steps):
        (tables({"a": torch.arange(ROWS)})["a"] * target(step)).sum().backward()
        optimizer.step()
    return first, rows_of(tables)


TORCH: dict[str, tuple[Make, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]] = {
    "sgd": (lambda c: SparseSGD(c, 0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "sgd momentum decay": (
        lambda c: SparseSGD(c, 0.1, momentum=0.9, weight_decay=0.05),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.05),
    ),
    "adagrad": (lambda c: SparseAdagrad(c, 0.1), lambda p: torch.optim.Adagrad(p, 0.1)),
    "adagrad filled": (
        lambda c: SparseAdagrad(c, 0.1, eps=1e-3, initial_accumulator_value=0.5),
        lambda p: torch.optim.Adagrad(p, 0.1, eps=1e-3, initial_accumulator_value=0.5),
    ),
    "adam": (lambda c: SparseAdam(c, 0.1), lambda p: torch.optim.Adam(p, 0.1)),
    "adam decay": (
        lambda c: SparseAdam(c, 0.1, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.1, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
    ),
    "adamw": (lambda c: SparseAdamW(c, 0.1), lambda p: torch.optim.AdamW(p, 0.1)),
    "adamw global": (
        lambda c: SparseAdamW(c, 0.1, weight_decay=0.3, step_mode="global"),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.3),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_s14_equal_to_torch_on_rows_touched_every_step(name: str) -> None:
    make, make_torch = TORCH[name]
    first, ours = train(make)
    weight = nn.Parameter(first.clone())
    optimizer = make_torch([weight])
    for step in range(6):
        optimizer.zero_grad()
        (weight * target(step)).sum().backward()
        optimizer.step()
    assert (ours - first).abs().min() > 1e-3
    torch.testing.assert_close(ours, weight.detach(), rtol=1e-6, atol=1e-6)


def test_s14_the_global_clock_is_that_of_sparse_adam_on_rare_rows() -> None:
    tables = build()
    optimizer = SparseAdam(tables, 0.1, step_mode="global")
    dense = nn.Embedding(ROWS, DIM, sparse=True)
    with torch.no_grad():
        dense.weight.copy_(tables({"a": torch.arange(ROWS)})["a"])
    reference = torch.optim.SparseAdam(dense.parameters(), 0.1)
    for step in range(12):
        touched = torch.tensor([0, step % 5, 11 - step % 3])
        reference.zero_grad()
        for rows in (tables({"a": touched})["a"], dense(touched)):
            (rows * target(step)[:3]).sum().backward()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(rows_of(tables), dense.weight.detach(), rtol=1e-5, atol=1e-6)


def test_s14_the_global_clock_of_a_table_stands_still_in_steps_that_do_not_reach_it() -> None:
    tables = DynamicEmbeddingCollection(
        [TableConfig(name=n, embedding_dim=2, initializer={"kind": "constant", "value": 0.0}) for n in "ab"],
        [FeatureConfig(name=n, table=n) for n in "ab"],
        backend="naive",
    )
    optimizer = SparseAdam(tables, 0.1, step_mode="global")
    dense = nn.ModuleDict({n: nn.Embedding(1, 2, sparse=True) for n in "ab"})
    for parameter in dense.parameters():
        nn.init.zeros_(parameter)
    reference = torch.optim.SparseAdam(dense.parameters(), 0.1)
    for name in "aaaaab":
        reference.zero_grad()
        for rows in (tables({name: torch.tensor([0])})[name], dense[name](torch.tensor([0]))):
            rows.sum().backward()
        optimizer.step()
        reference.step()
    for name in "ab":
        torch.testing.assert_close(tables.export_rows(name)["rows"], dense[name].weight.detach())


def test_s14_the_row_clock_corrects_a_rare_row_fully() -> None:
    """The first update of a row is lr, however late it comes; with the global clock it is 3.2 lr after many steps."""
    sizes = {}
    for mode in ("row", "global"):
        tables = build()
        optimizer = SparseAdam(tables, 0.1, step_mode=mode)
        for _ in range(1500):
            optimizer.param_groups[0]["steps"] += 1
        before = tables({"a": torch.tensor([7])})["a"]
        before.sum().backward()
        optimizer.step()
        sizes[mode] = (rows_of(tables) - before.detach()).abs().mean().item() / 0.1
        assert tables.export_rows("item")["step"].tolist() == [1]
    assert sizes["row"] == pytest.approx(1.0, rel=1e-4)
    assert sizes["global"] == pytest.approx((1 - 0.9) / math.sqrt(1 - 0.999), rel=0.15)


def test_rowwise_adagrad_is_its_formula() -> None:
    first, ours = train(lambda c: SparseRowwiseAdagrad(c, 0.1, initial_accumulator_value=0.25))
    rows, total = first.double(), torch.full((ROWS, 1), 0.25, dtype=torch.float64)
    for step in range(6):
        gradient = target(step).double()
        total += gradient.square().mean(dim=1, keepdim=True)
        rows -= 0.1 * gradient / (total.sqrt() + 1e-8)
    torch.testing.assert_close(ours.double(), rows, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- apart from backward

ALL: dict[str, Make] = {name: make for name, (make, _) in TORCH.items()} | {
    "rowwise": lambda c: SparseRowwiseAdagrad(c, 0.1)
}
BATCHES = [torch.tensor([3, 3, 8]), torch.tensor([], dtype=torch.int64), torch.tensor([8, 1, 3, -2])]


def loss(rows: Tensor, ids: Tensor) -> Tensor:
    return (rows.square().sum(-1) * (ids + 4)).sum() + rows.sum()


@pytest.mark.parametrize("name", ALL)
def test_s9_micro_batches_and_pending_steps_are_one_big_batch(name: str) -> None:
    """One forward of everything == one prepared step of micro-batches == several forwards before one optimizer step."""
    results = []
    for way in ("big", "micro", "pending"):
        tables = build()
        optimizer = ALL[name](tables)
        for _ in range(3):
            if way == "big":
                ids = torch.cat(BATCHES)
                loss(tables({"a": ids})["a"], ids).backward()
            elif way == "micro":
                step = tables.prepare([{"a": ids} for ids in BATCHES]).fetch()
                for k, ids in enumerate(BATCHES):
                    loss(step[k]["a"], ids).backward()
            else:
                forwards = [(tables({"a": ids})["a"], ids) for ids in BATCHES]
                for rows, ids in reversed(forwards):
                    loss(rows, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(tables.export_rows("item"))
    assert results[0]["step"].tolist() == [3, 3, 3, 3]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def test_s12_zero_grad_drops_and_a_second_backward_accumulates() -> None:
    tables = build()
    optimizer = SparseSGD(tables, 1.0)
    rows = tables({"a": torch.tensor([1])})["a"]
    start = rows.detach().clone()
    (rows.sum() * 100).backward(retain_graph=True)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(rows_of(tables), start) and tables.export_rows("item")["step"].item() == 0
    rows = tables({"a": torch.tensor([1])})["a"]
    rows.sum().backward(retain_graph=True)
    (rows * 2).sum().backward()
    optimizer.step()
    torch.testing.assert_close(rows_of(tables), start - 3)
    assert tables.export_rows("item")["step"].item() == 1


def test_s12_zero_grad_between_forward_and_backward_is_harmless_as_in_torch() -> None:
    tables = build()
    optimizer = SparseSGD(tables, 1.0)
    rows = tables({"a": torch.tensor([1])})["a"]
    optimizer.zero_grad()
    optimizer.zero_grad()
    optimizer.zero_grad()
    rows.sum().backward()
    optimizer.step()
    torch.testing.assert_close(rows_of(tables), rows.detach() - 1)


def test_s12_dropped_gradients_do_not_come_back_with_a_second_backward() -> None:
    for drop in ("zero_grad", "step"):
        tables = build()
        optimizer = SparseSGD(tables, 1.0)
        rows = tables({"a": torch.tensor([1])})["a"]
        (rows.sum() * 100).backward(retain_graph=True)
        getattr(optimizer, drop)()
        before = rows_of(tables)
        rows.sum().backward()
        optimizer.step()
        torch.testing.assert_close(rows_of(tables), before - 1)


def test_s12_a_step_without_gradients_changes_nothing() -> None:
    tables = build()
    optimizer = SparseAdamW(tables, 0.1, step_mode="global")
    optimizer.step()
    tables({"a": torch.tensor([1])})
    optimizer.step()
    assert optimizer.param_groups[0]["steps"] == 0 and optimizer.grad_norm == 0.0
    assert tables.export_rows("item")["step"].tolist() == [0]


def test_pending_steps_are_forgotten_after_a_while() -> None:
    """A loop in training mode that never steps must not keep every leaf."""
    tables = build()
    optimizer = SparseSGD(tables, 1.0)
    for _ in range(10):
        tables({"a": torch.tensor([1])})
        optimizer.zero_grad()
    assert len(optimizer._pending) <= 1


def test_s8_ids_that_are_not_inserted_get_no_gradient() -> None:
    tables = build(unknown="initial")
    optimizer = SparseAdam(tables, 1.0)
    with torch.no_grad():
        tables({"a": torch.tensor([1])})
    rows = tables({"a": torch.tensor([1, 2])}, insert=False)["a"]
    rows.sum().backward()
    optimizer.step()
    assert tables.num_rows() == 1 and tables.export_rows("item")["step"].tolist() == [1]
    torch.testing.assert_close(rows_of(tables), rows[:1].detach() - 1)


# ---------------------------------------------------------------------- reduce, clip, non-finite


def test_reduce_scales_and_clipping_takes_the_norm_over_all_tables() -> None:
    tables = build()
    optimizer = SparseSGD(tables, 1.0, max_grad_norm=1.0)
    batch = tables({"a": torch.tensor([1, 1]), "b": torch.tensor([5])})
    ((batch["a"].sum() * 2 + batch["b"].sum() * 3) * 64).backward()
    before = {name: rows_of(tables, name) for name in ("item", "user")}
    assert optimizer.reduce(scale=1 / 64)
    norm = math.sqrt(DIM * 4**2 + DIM * 3**2)
    assert optimizer.grad_norm == pytest.approx(norm)
    optimizer.step()
    torch.testing.assert_close(before["item"] - rows_of(tables), torch.full((1, DIM), 4 / norm))
    torch.testing.assert_close(before["user"] - rows_of(tables, "user"), torch.full((1, DIM), 3 / norm))


def test_reduce_scales_several_pending_steps_alike() -> None:
    tables = build()
    optimizer = SparseSGD(tables, 1.0)
    forwards = [tables({"a": torch.tensor(ids)})["a"] for ids in ([1], [1, 2])]
    for rows in forwards:
        (rows.sum() * 8).backward()
    optimizer.reduce(scale=1 / 8)
    optimizer.step()
    torch.testing.assert_close(rows_of(tables), forwards[1].detach() - torch.tensor([[2.0], [1.0]]))


def test_no_clipping_below_the_norm() -> None:
    tables = build()
    optimizer = SparseSGD(tables, 1.0, max_grad_norm=100.0)
    rows = tables({"a": torch.tensor([1])})["a"]
    rows.sum().backward()
    optimizer.step()
    torch.testing.assert_close(rows_of(tables), rows.detach() - 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_s11_not_finite_gradients_leave_tables_alone(bad: float) -> None:
    tables = build()
    optimizer = SparseAdam(tables, 0.1)
    (tables({"a": torch.tensor([1, 2])})["a"] * torch.tensor([[bad], [1.0]])).sum().backward()
    before = tables.export_rows("item")
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step()
    optimizer.step()  # the gradients are gone
    (tables({"a": torch.tensor([1, 2])})["a"] * bad).sum().backward()
    assert optimizer.reduce() is False
    optimizer.step()
    torch.testing.assert_close(tables.export_rows("item"), before, rtol=0, atol=0)
    assert optimizer.param_groups[0]["steps"] == 0


def test_misuse_of_reduce() -> None:
    tables = build()
    optimizer = SparseSGD(tables, 1.0)
    rows = tables({"a": torch.tensor([1])})["a"]
    rows.sum().backward(retain_graph=True)
    optimizer.reduce()
    with pytest.raises(RuntimeError, match="already"):
        optimizer.reduce()
    with pytest.raises(RuntimeError, match="between reduce"):
        rows.sum().backward()
    optimizer.zero_grad()
    assert optimizer.reduce() is True


# ---------------------------------------------------------------------- torch's interface


def test_param_groups_rates_and_schedulers_are_per_table() -> None:
    tables = build()
    optimizer = SparseSGD(tables, {"item": 1.0, "user": 0.5})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    assert [g["name"] for g in optimizer.param_groups] == ["item", "user"]
    for _ in range(2):
        batch = tables({"a": torch.tensor([1]), "b": torch.tensor([1])})
        (batch["a"].sum() + batch["b"].sum()).backward()
        before = {name: rows_of(tables, name) for name in ("item", "user")}
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(before["item"] - rows_of(tables), torch.full((1, DIM), 0.5))
    torch.testing.assert_close(before["user"] - rows_of(tables, "user"), torch.full((1, DIM), 0.25))


def test_s18_state_dict_is_json_like_and_carries_the_global_clock() -> None:
    tables = build()
    optimizer = SparseAdamW(tables, 0.1, step_mode="global")
    tables({"a": torch.tensor([1])})["a"].sum().backward()
    optimizer.step()
    saved: dict[str, Any] = json.loads(json.dumps(optimizer.state_dict()))
    other = SparseAdamW(build(), 0.7, step_mode="global")
    other.load_state_dict(saved)
    assert [(g["name"], g["lr"], g["steps"]) for g in other.param_groups] == [("item", 0.1, 1), ("user", 0.1, 0)]


def test_closure() -> None:
    tables = build()
    optimizer = SparseSGD(tables, 1.0)

    def closure() -> Tensor:
        value = tables({"a": torch.tensor([1])})["a"].sum()
        value.backward()
        return value

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert (first - second).item() == pytest.approx(DIM)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: SparseSGD(c, -1.0), "lr of table 'item' must be at least 0"),
        (lambda c: SparseSGD(c, {"item": 1.0}), "lr must name each"),
        (lambda c: SparseSGD(c, 1.0, momentum=1.0), "momentum"),
        (lambda c: SparseAdagrad(c, 1.0, eps=-1), "eps"),
        (lambda c: SparseAdam(c, 1.0, betas=(0.9, 1.0)), "betas\\[1\\]"),
        (lambda c: SparseAdam(c, 1.0, step_mode="id"), "got 'id'"),
        (lambda c: SparseAdamW(c, 1.0, weight_decay=float("nan")), "weight_decay"),
        (lambda c: SparseAdamW(c, 1.0, max_grad_norm=-1), "max_grad_norm"),
    ],
)
def test_bad_hyperparameters_are_refused(make: Make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(build())
