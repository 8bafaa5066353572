"""S11, S19, S23 and S25 as whole sentences; the others are tested where their parts are (names of tests say S...)."""

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
from grzoo.embeddings import deletion as deletion_module
from grzoo.embeddings.deltas import Delta, apply_delta, take_delta
from grzoo.embeddings.io import load_tables, save_tables
from torch import Tensor

OPTIMIZERS: dict[str, Callable[[DynamicEmbeddingCollection], SparseOptimizer]] = {
    "sgd": lambda c: SparseSGD(c, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda c: SparseAdagrad(c, lr=0.1),
    "rowwise_adagrad": lambda c: SparseRowwiseAdagrad(c, lr=0.1),
    "adam": lambda c: SparseAdam(c, lr=0.1),
    "adam_global": lambda c: SparseAdam(c, lr=0.1, step_mode="global"),
    "adamw": lambda c: SparseAdamW(c, lr=0.1, max_grad_norm=0.5),
}
LRU: dict[str, Any] = {"max_rows": 12, "eviction": {"kind": "lru", "every": 2}}


def build(backend: str = "host", **fields: Any) -> DynamicEmbeddingCollection:
    tables = [TableConfig(name=name, embedding_dim=3, **fields) for name in ("item", "user")]
    return DynamicEmbeddingCollection(
        tables, [FeatureConfig(name=t.name, table=t.name) for t in tables], backend=backend
    )


def train(tables: DynamicEmbeddingCollection, optimizer: SparseOptimizer, steps: range) -> None:
    for number in steps:
        ids = torch.randint(number, number + 8, (10,), generator=torch.Generator().manual_seed(number))
        found = tables({"item": ids, "user": ids[:4]})
        sum((rows.square().sum() for rows in found.values()), torch.zeros(())).backward()
        optimizer.step()


def everything(tables: DynamicEmbeddingCollection) -> dict[str, dict[str, Tensor]]:
    return {name: tables.export_rows(name) for name in tables.table_names}


def assert_same_bits(a: DynamicEmbeddingCollection, b: DynamicEmbeddingCollection) -> None:
    for name, columns in everything(a).items():
        others = b.export_rows(name)
        assert len(columns["ids"]) > 0 and set(columns) == set(others)
        assert all(torch.equal(values, others[column]) for column, values in columns.items()), name


def test_s11_the_norm_is_over_all_tables_and_clips_all_by_one_factor() -> None:
    tables = build()
    optimizer = SparseSGD(tables, lr=1.0, max_grad_norm=1.0)
    found = tables({"item": torch.tensor([1]), "user": torch.tensor([2])})
    before = {name: rows.detach().clone() for name, rows in found.items()}
    (found["item"] * 3 + found["user"] * 4).sum().backward()
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx((3 * (9 + 16)) ** 0.5)
    for name, gradient in (("item", 3.0), ("user", 4.0)):
        moved = before[name] - tables.export_rows(name)["rows"]
        torch.testing.assert_close(moved, torch.full((1, 3), gradient / optimizer.grad_norm), rtol=1e-5, atol=1e-6)


def test_s11_a_loss_scale_is_taken_out_and_its_overflow_skips_the_step_and_drops_the_gradients() -> None:
    plain, scaled = build(), build()
    optimizers = SparseAdam(plain, lr=0.1, max_grad_norm=0.5), SparseAdam(scaled, lr=0.1, max_grad_norm=0.5)
    for tables, optimizer, scale in ((plain, optimizers[0], 1.0), (scaled, optimizers[1], 1024.0)):
        (tables({"item": torch.tensor([1, 2])})["item"].square().sum() * scale).backward()
        assert optimizer.reduce(scale=1 / scale)
        optimizer.step()
    assert optimizers[0].grad_norm == pytest.approx(optimizers[1].grad_norm)
    torch.testing.assert_close(scaled.export_rows("item"), plain.export_rows("item"))
    kept, clock = scaled.export_rows("item"), scaled.clock
    (scaled({"item": torch.tensor([1, 2])})["item"].sum() * torch.inf).backward()
    assert not optimizers[1].reduce(scale=1 / 1024)  # the dense step would be skipped too: see engine/
    optimizers[1].step()
    optimizers[1].step()  # nothing is left to be applied
    assert scaled.clock == clock
    for column, values in scaled.export_rows("item").items():
        assert torch.equal(values, kept[column])


@pytest.mark.parametrize("backend", ["naive", "host"])
def test_s19_growth_leaves_rows_that_wait_for_gradients_where_they_are(backend: str) -> None:
    tables = build(backend)
    optimizer = SparseSGD(tables, lr=1.0)
    step = tables.prepare([{"item": torch.tensor([5, -7])}]).fetch()
    rows = step[0]["item"]
    more = torch.arange(100, 40_000)
    tables.import_rows("item", {"ids": more, "rows": torch.ones(len(more), 3)})
    tables.prepare([{"item": torch.arange(50_000, 90_000)}])
    (rows * torch.tensor([[1.0], [2.0]])).sum().backward()
    optimizer.step()
    found = tables.export_rows("item")
    at = {int(i): row for i, row in zip(found["ids"], found["rows"], strict=True)}
    torch.testing.assert_close(at[5], rows[0].detach() - 1)
    torch.testing.assert_close(at[-7], rows[1].detach() - 2)
    assert at[100].eq(1).all()


@pytest.mark.parametrize("fields", [{}, {"row_dtype": "bfloat16"}, LRU], ids=["float32", "bfloat16", "evicting"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_s23_resumed_is_never_stopped_bit_for_bit(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    """The dense side, the loader's position and real ranks: tests/distributed, resume of engines."""
    whole = build(**fields)
    optimizer = OPTIMIZERS[name](whole)
    train(whole, optimizer, range(3))
    save_tables(whole, tmp_path, state=True)
    saved = optimizer.state_dict()
    train(whole, optimizer, range(3, 7))
    resumed = build(**fields)
    other = OPTIMIZERS[name](resumed)
    load_tables(resumed, tmp_path, state=True)
    other.load_state_dict(saved)
    train(resumed, other, range(3, 7))
    assert_same_bits(whole, resumed)
    assert resumed.clock == whole.clock == 7


# ---- S25: deltas ----


def test_s25_a_full_copy_and_its_deltas_in_order_are_the_table(tmp_path: Path) -> None:
    tables = build(**LRU)
    optimizer = SparseAdam(tables, lr=0.1)
    train(tables, optimizer, range(3))
    save_tables(tables, tmp_path, state=True)
    follower, serving = build(**LRU), build("naive", **LRU)
    attached = SparseAdam(follower, lr=0.1)
    for copy in (follower, serving):
        load_tables(copy, tmp_path, state=copy is follower)
        copy.clock = tables.clock
    base, sent, gone = tables.clock, 0, set()
    for steps in (range(3, 6), range(6, 7), range(7, 16)):
        train(tables, optimizer, steps)
        tables.erase("item", torch.tensor([steps[0] + 1, 999]))
        delta = take_delta(tables, base)
        sent, base = sent + len(delta.rows["item"]["ids"]), delta.clock
        gone |= set(delta.deleted["item"].tolist())
        for copy in (follower, serving):
            apply_delta(copy, [delta])
        assert_same_bits(tables, follower)
        assert torch.equal(serving.export_rows("user")["rows"], tables.export_rows("user")["rows"])
    assert gone and sent < 3 * tables.num_rows("item") + len(gone)
    assert attached.collection is follower


def test_s25_a_delta_has_the_rows_that_were_trained_whenever_they_were_prepared() -> None:
    tables, follower = build(track_use=True), build(track_use=True)
    optimizer = SparseSGD(tables, lr=1.0)
    mine = torch.tensor([1000, 1001])  # of no other step
    tables({"item": mine, "user": mine})["item"].sum().backward()
    optimizer.step()
    apply_delta(follower, [take_delta(tables, 0)])
    for late in (tables.prepare([{"item": mine[:1]}]), tables.prepare([{"item": mine[1:]}], count=False)):
        train(tables, optimizer, range(2))
        apply_delta(follower, [take_delta(tables, follower.clock)])
        late.fetch()[0]["item"].sum().backward()
        optimizer.step()
        apply_delta(follower, [take_delta(tables, follower.clock)])
        assert_same_bits(tables, follower)


def test_s18_an_imported_use_of_a_longer_training_is_of_now() -> None:
    trained, fresh = build(**LRU), build(**LRU)
    optimizer, other = SparseSGD(trained, lr=1.0), SparseSGD(fresh, lr=1.0)
    train(trained, optimizer, range(5))
    exported = trained.export_rows("item")
    fresh.import_rows("item", exported)
    assert set(fresh.export_rows("item")["last_use"].tolist()) == {0}
    train(fresh, other, range(5))
    fresh.import_rows("item", exported)
    assert torch.equal(fresh.export_rows("item")["last_use"], exported["last_use"])


def test_s25_an_id_that_went_and_came_back_is_the_later_one() -> None:
    tables = build(track_use=True)
    optimizer = SparseSGD(tables, lr=1.0)
    train(tables, optimizer, range(1))
    follower = build(track_use=True)
    apply_delta(follower, [take_delta(tables, 0)])
    mine = tables.ids("item")[:1]
    tables.erase("item", mine)
    tables({"item": mine})["item"].sum().backward()
    optimizer.step()
    delta = take_delta(tables, 1)
    assert mine.tolist()[0] not in delta.deleted["item"].tolist()
    apply_delta(follower, [delta])
    assert_same_bits(tables, follower)


def test_s25_a_delta_that_does_not_follow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = build(track_use=True)
    optimizer = SparseSGD(tables, lr=1.0)
    train(tables, optimizer, range(2))
    first = take_delta(tables, 0)
    train(tables, optimizer, range(2, 4))
    second, follower = take_delta(tables, 2), build(track_use=True)
    with pytest.raises(ValueError, match="from step 2 to 4 does not follow a copy of step 0"):
        apply_delta(follower, [second])
    with pytest.raises(ValueError, match=r"of the same steps, these are of \[\(0, 2\), \(2, 4\)\]"):
        apply_delta(follower, [first, second])
    with pytest.raises(ValueError, match="since step 9 cannot be taken after step 4"):
        take_delta(tables, 9)
    with pytest.raises(ValueError, match=r"tables \['item', 'user'\] do not know .*track_use=True"):
        take_delta(build(), 0)
    assert follower.num_rows() == 0
    apply_delta(follower, [Delta(0, 2, first.rows, first.deleted)])
    apply_delta(follower, [second])
    assert_same_bits(tables, follower)
    monkeypatch.setattr(deletion_module, "LOG_ROWS", 2)
    tables.erase("item", tables.ids("item")[:4])
    for _ in range(2):  # the logs stay as they are
        with pytest.raises(ValueError, match="lost 2 deletions: save all rows"):
            take_delta(tables, 4)
