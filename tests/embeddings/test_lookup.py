"""A fetched step has the rows of its fetch, whatever happens to the table before they are read; norms of gradients."""

import pytest
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseAdam, SparseSGD, TableConfig
from grzoo.embeddings.kernels import BackendUnavailable, get_backend
from torch import Tensor

try:
    get_backend("host")
    BACKENDS = ["naive", "host"]
except BackendUnavailable:
    BACKENDS = ["naive"]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
IDS = torch.tensor([5, -9, 5, 2**62, 5, -9])


def build(backend: str, **options: object) -> DynamicEmbeddingCollection:
    table = TableConfig(name="item", embedding_dim=20, initializer={"kind": "uniform", "scale": 1.0}, **options)  # type: ignore[arg-type]
    features = [FeatureConfig(name="ids", table="item"), FeatureConfig(name="other", table="item")]
    return DynamicEmbeddingCollection([table], features, backend=backend, seed=1)


def current(tables: DynamicEmbeddingCollection, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return tables({"ids": ids}, insert=False)["ids"].clone()


def update(tables: DynamicEmbeddingCollection) -> None:
    tables({"ids": IDS})["ids"].sum().backward()
    assert tables.optimizer is not None
    tables.optimizer.step()


def test_a_step_that_is_read_after_an_update_has_the_rows_of_its_fetch(backend: str) -> None:
    tables = build(backend)
    optimizer = SparseSGD(tables, lr=1.0)
    step = tables.prepare([{"ids": IDS}, {"other": IDS[:3]}]).fetch()
    before = current(tables)
    update(tables)
    assert torch.equal(step[0]["ids"], before) and torch.equal(step[1]["other"], before[:3])
    assert not torch.equal(current(tables), before) and optimizer is tables.optimizer


def test_a_step_that_is_read_before_and_after_an_update_has_the_rows_of_its_fetch(backend: str) -> None:
    tables = build(backend)
    optimizer = SparseSGD(tables, lr=1.0)
    step = tables.prepare([{"ids": IDS}, {"other": IDS.flip(0)}]).fetch()
    before = current(tables)
    assert torch.equal(step[0]["ids"], before)
    update(tables)
    leaf, index = step[1].rows("other")
    assert torch.equal(step[0]["ids"], before) and torch.equal(step[1]["other"], before.flip(0))
    assert torch.equal(leaf[index], before.flip(0)) and optimizer is tables.optimizer


def test_a_step_of_evaluation_has_the_rows_of_its_fetch_however_often_it_is_read(backend: str) -> None:
    tables = build(backend)
    optimizer = SparseSGD(tables, lr=1.0)
    tables.prepare([{"ids": IDS}])
    with torch.no_grad():
        step = tables.prepare([{"ids": IDS}, {"other": IDS[2:]}], insert=False).fetch()
        before = step[0]["ids"].clone()
        assert torch.equal(step[1]["other"], before[2:])
    update(tables)
    assert torch.equal(step[0]["ids"], before) and torch.equal(step[1]["other"], before[2:])
    assert not torch.equal(current(tables), before) and optimizer is tables.optimizer


@pytest.mark.parametrize("change", ["erase", "import", "close", "copy"])
def test_rows_that_go_or_are_overwritten_stay_in_a_fetched_step(backend: str, change: str) -> None:
    tables = build(backend)
    optimizer = SparseSGD(tables, lr=1.0)
    step = tables.prepare([{"ids": IDS}]).fetch()
    before = current(tables)
    if change == "erase":
        tables.erase("item", IDS[:1])
        tables({"ids": torch.arange(100, 110)})
    elif change == "import":
        tables.import_rows("item", {"ids": IDS[:2], "rows": torch.ones(2, 20)})
    elif change == "close":
        tables.close()
    else:
        assert step.shares[0].leaf is not None
    assert torch.equal(step[0]["ids"], before) and optimizer is tables.optimizer


@pytest.mark.parametrize("unknown", ["zeros", "initial", "shared"])
def test_unknown_ids_get_their_default_rows(backend: str, unknown: str) -> None:
    tables = build(backend, unknown=unknown).eval()
    known = torch.tensor([1, 2])
    with torch.no_grad():
        tables.prepare([{"ids": known}], insert=True)
        rows = tables({"ids": torch.tensor([1, 77, 2, 77])})["ids"]
    assert torch.equal(rows[[0, 2]], current(tables, known)) and torch.equal(rows[1], rows[3])
    assert rows[1].eq(0).all() == (unknown == "zeros")


def test_ids_of_any_shape_and_number_meet_in_one_gradient(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.rand(60, 50, generator=generator) ** 4 * 700).long()
    weights = torch.randn(60, 50, 20, generator=generator)
    tables = build(backend)
    optimizer = SparseSGD(tables, lr=1.0)
    rows = tables({"ids": drawn, "other": drawn[:0]})
    assert rows["other"].shape == (0, 50, 20) and rows["ids"].shape == weights.shape
    value = rows["ids"].detach().clone()
    ((rows["ids"] * weights).sum() + rows["other"].sum()).backward()
    optimizer.step()
    expected = torch.zeros(700, 20).index_add_(0, drawn.flatten(), weights.flatten(0, 1))
    torch.testing.assert_close(current(tables, drawn), value - expected[drawn], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["once", "twice", "by leaf", "scaled", "none left"])
def test_the_norm_is_that_of_the_gradients_that_are_applied(backend: str, case: str) -> None:
    tables = build(backend)
    optimizer = SparseAdam(tables, lr=0.1)
    step = tables.prepare([{"ids": IDS}, {"other": IDS[:4]}]).fetch()
    expected = 3.0 * torch.tensor([3.0, 2.0, 1.0])  # occurrences of the distinct ids
    loss = 3 * step[0]["ids"].sum()
    if case == "by leaf":
        leaf, index = step[1].rows("other")
        loss = loss + leaf[index].sum()
        expected += torch.tensor([2.0, 1.0, 1.0])
    loss.backward()
    grad = step.shares[0].leaf.grad  # type: ignore[union-attr]
    assert grad is not None
    if case == "twice":
        step[1]["other"].sum().backward()
        expected += torch.tensor([2.0, 1.0, 1.0])
    elif case == "scaled":
        grad.mul_(2)
        expected *= 2
    elif case == "none left":
        optimizer.zero_grad()
        (2 * tables({"ids": IDS[:1]})["ids"].sum()).backward()
        expected = torch.tensor([2.0])
    assert optimizer.reduce()
    assert optimizer.grad_norm == pytest.approx((expected.square().sum() * 20).sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_leave_the_rows_alone(backend: str, bad: float) -> None:
    tables = build(backend)
    optimizer = SparseAdam(tables, lr=0.1)
    rows = tables({"ids": IDS})["ids"]
    before = current(tables)
    grad = torch.zeros_like(rows)
    grad[3, 7] = bad
    rows.backward(grad)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert torch.equal(current(tables), before)
