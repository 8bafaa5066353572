"""The collection in one process: semantics S1, S2, S4-S7, S9, S12, S26-S28 and bad input."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grzoo.embeddings import (
    DynamicEmbeddingCollection,
    FeatureConfig,
    SparseAdagrad,
    SparseAdamW,
    SparseSGD,
    TableConfig,
)
from grzoo.embeddings.hashing import bucket
from torch import Tensor, nn

INT64 = [0, -1, 1, 2**63 - 1, -(2**63), 1 << 52, 1 << 63 - 1, 0x7FF << 52]
TABLES = [
    TableConfig(name="item", embedding_dim=4, initializer={"kind": "normal", "std": 1.0}),
    TableConfig(name="user", embedding_dim=4, initializer={"kind": "uniform", "scale": 1.0}, unknown="initial"),
    TableConfig(name="wide", embedding_dim=7),
]
FEATURES = [
    FeatureConfig(name="input_ids", table="item"),
    FeatureConfig(name="negative_ids", table="item"),
    FeatureConfig(name="user_ids", table="user"),
    FeatureConfig(name="context", table="wide"),
]


def build(**options: object) -> DynamicEmbeddingCollection:
    return DynamicEmbeddingCollection(TABLES, FEATURES, **({"backend": "naive", "seed": 1} | options))  # type: ignore[arg-type]


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def look_up(tables: DynamicEmbeddingCollection, feature: str, values: Tensor, insert: bool | None = None) -> Tensor:
    with torch.no_grad():
        return tables({feature: values}, insert=insert)[feature]


# ---------------------------------------------------------------------- identity


def test_s1_the_value_of_a_row_does_not_depend_on_history_or_order() -> None:
    a, b = build(), build()
    values = ids(*INT64)
    look_up(b, "input_ids", torch.arange(1000))
    look_up(b.eval(), "input_ids", values)
    b.train()
    first = look_up(a, "input_ids", values)
    assert torch.equal(first, look_up(b, "input_ids", values.flip(0)).flip(0))
    assert torch.equal(first, look_up(a, "negative_ids", values))
    assert not torch.equal(first, look_up(build(seed=2), "input_ids", values))
    assert first.unique().numel() == first.numel()


def test_s2_any_int64_is_a_valid_id() -> None:
    tables = build()
    optimizer = SparseSGD(tables, lr=1.0)
    values = ids(*INT64)
    before = look_up(tables, "input_ids", values)
    tables({"input_ids": values, "user_ids": values})["input_ids"].sum().backward()
    optimizer.step()
    assert tables.num_rows("item") == tables.num_rows("user") == len(set(INT64))
    torch.testing.assert_close(look_up(tables, "input_ids", ids(2**63 - 1)), before[3:4] - 1)


# ---------------------------------------------------------------------- forward


def test_s4_evaluation_never_changes_a_table() -> None:
    tables = build()
    look_up(tables, "input_ids", ids(1, 2))
    tables.eval()
    before, serial = tables.export_rows("item"), torch.random.get_rng_state()
    known, unknown = look_up(tables, "input_ids", ids(2, 99))
    assert unknown.tolist() == [0.0] * 4 and known.abs().sum() > 0
    assert tables.total_rows() == 2 and torch.equal(serial, torch.random.get_rng_state())
    assert all(torch.equal(v, tables.export_rows("item")[k]) for k, v in before.items())
    assert not tables({"input_ids": ids(1)})["input_ids"].requires_grad


def test_s4_unknown_initial_is_the_value_that_the_row_would_have() -> None:
    tables = build().eval()
    unknown = look_up(tables, "user_ids", ids(5, -5))
    assert tables.num_rows() == 0 and unknown.abs().min() > 0
    assert torch.equal(unknown, look_up(tables, "user_ids", ids(5, -5), insert=True)) and tables.num_rows("user") == 2


def test_s5_the_forward_value_of_a_new_row_is_the_stored_one() -> None:
    tables = build()
    rows = look_up(tables, "context", ids(3, -7))
    stored = tables.export_rows("wide")
    assert all(torch.equal(rows[i], stored["rows"][stored["ids"].tolist().index(v)]) for i, v in enumerate((3, -7)))


@pytest.mark.parametrize("shape", [(0,), (1, 0), (1,), (3, 1, 2), ()])
def test_s7_odd_shapes(shape: tuple[int, ...]) -> None:
    tables = build()
    optimizer = SparseAdamW(tables)
    embeddings = tables({"input_ids": torch.zeros(shape, dtype=torch.int64)})
    rows = embeddings["input_ids"]
    assert rows.shape == (*shape, 4) and rows.dtype == torch.float32 and list(embeddings) == ["input_ids"]
    rows.sum().backward()
    optimizer.step()
    assert tables.num_rows() == min(1, rows.numel())


def test_s7_a_step_of_nothing() -> None:
    tables = build()
    optimizer = SparseAdamW(tables)
    assert len(tables.prepare([]).fetch()) == 0 and len(tables.prepare([{}]).fetch()[0]) == 0
    optimizer.step()
    assert tables.num_rows() == 0 and tables.memory_bytes() < 10_000


# ---------------------------------------------------------------------- backward


def dense_twin(tables: DynamicEmbeddingCollection, values: Tensor) -> nn.Embedding:
    """nn.Embedding over 0..9 with the same rows."""
    dense = nn.Embedding(10, 4)
    dense.weight.data = look_up(tables, "input_ids", torch.arange(10))
    return dense


def test_s6_duplicates_share_a_row_and_sum_gradients_as_a_dense_embedding() -> None:
    tables = build()
    optimizer = SparseSGD(tables, lr=0.5)
    values = torch.tensor([[3, 3, 1], [9, 3, 1]])
    dense = dense_twin(tables, values)
    factor = torch.randn(2, 3, 4)
    embeddings = tables({"input_ids": values, "negative_ids": values.flip(1)})
    (embeddings["input_ids"] * factor + embeddings["negative_ids"].square()).sum().backward()
    (dense(values) * factor + dense(values.flip(1)).square()).sum().backward()
    optimizer.step()
    assert torch.equal(embeddings["input_ids"][0, 0], embeddings["input_ids"][1, 1])
    expected = dense.weight.detach() - 0.5 * dense.weight.grad
    torch.testing.assert_close(look_up(tables, "input_ids", torch.arange(10)), expected, rtol=1e-6, atol=1e-6)


def test_rows_for_kernels_that_gather_by_themselves_have_the_same_gradient() -> None:
    results = []
    for by_hand in (False, True):
        tables = build()
        optimizer = SparseAdagrad(tables, lr=0.5)
        values = torch.tensor([[3, 3, 1], [9, 3, 1]])
        embeddings = tables({"input_ids": values, "negative_ids": ids(3, 4)})
        leaf, index = embeddings.rows("negative_ids")
        assert leaf.shape == (4, 4) and torch.equal(leaf[index], embeddings["negative_ids"])
        rows = leaf[index] if by_hand else embeddings["negative_ids"]
        (embeddings["input_ids"].sum() * rows.square().sum()).backward()
        optimizer.step()
        results.append(tables.export_rows("item"))
    torch.testing.assert_close(results[0], results[1])


def test_only_rows_by_hand_also_reach_the_optimizer() -> None:
    tables = build()
    optimizer = SparseSGD(tables, lr=1.0)
    leaf, index = tables({"negative_ids": ids(3, 3)}).rows("negative_ids")
    before = leaf.detach()[index]
    leaf[index].sum().backward()
    optimizer.step()
    torch.testing.assert_close(look_up(tables, "negative_ids", ids(3, 3)), before - 2)


def test_backward_is_deterministic_and_takes_strided_gradients() -> None:
    leaves = []
    for _ in range(2):
        tables = build()
        optimizer = SparseSGD(tables, lr=1.0)
        step = tables.prepare([{"input_ids": torch.arange(5000).reshape(2, -1) % 7}]).fetch()
        weights = torch.linspace(-1, 1, 5000).reshape(-1, 2)
        (step[0]["input_ids"].transpose(0, 1) * weights[..., None]).sum().backward()
        leaf = step.shares[0].leaf
        assert leaf is not None and leaf.grad is not None and optimizer is tables.optimizer
        leaves.append(leaf.grad)
    assert torch.equal(leaves[0], leaves[1])


def test_bf16_and_autocast_models_get_fp32_leaves() -> None:
    tables = build()
    optimizer = SparseSGD(tables, lr=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = tables({"input_ids": ids(1, 2)})["input_ids"]
        (rows.to(torch.bfloat16) @ torch.ones(4, 1, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert rows.dtype == torch.float32
    torch.testing.assert_close(look_up(tables, "input_ids", ids(1, 2)), rows.detach() - 1)


# ---------------------------------------------------------------------- module


def test_s26_the_module_hides_its_tables_from_torch() -> None:
    model = nn.ModuleDict({"tables": build(), "head": nn.Linear(4, 1)})
    rows = look_up(model["tables"], "input_ids", ids(1, 2))
    assert list(model["tables"].parameters()) == list(model["tables"].buffers()) == []
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    model.to(torch.bfloat16).requires_grad_(False)
    assert torch.equal(look_up(model["tables"], "input_ids", ids(1, 2)), rows)
    assert model.eval()["tables"].training is False
    with torch.device("meta"):
        on_meta = build()
    assert torch.equal(look_up(on_meta, "input_ids", ids(1, 2)), rows)
    model.to_empty(device="cpu")
    assert torch.equal(look_up(model["tables"], "input_ids", ids(1, 2)), rows)


@pytest.mark.parametrize("values", [ids(*INT64), ids(4, 4, -4)])
def test_s27_merged_tables_are_indistinguishable_from_unmerged_ones(values: Tensor) -> None:
    merged, apart = build(), build(merge=False)
    assert [len(t.configs) for t in merged.physical] == [2, 1] and len(apart.physical) == 3
    for tables in (merged, apart):
        optimizer = SparseAdamW(tables, lr={"item": 0.1, "user": 0.3, "wide": 0.1}, max_grad_norm=1.0)
        for _ in range(3):
            # The user table is looked up and takes no part in the loss: its rows must stay as they are.
            batch = tables({"input_ids": values, "user_ids": values, "context": values[:1]})
            (batch["input_ids"].square().sum() + batch["context"].sum()).backward()
            optimizer.step()
    for name in ("item", "user", "wide"):
        a, b = merged.export_rows(name), apart.export_rows(name)
        assert a.keys() == b.keys()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert merged.export_rows("user")["step"].tolist() == [0] * len(set(values.tolist()))


def test_s27_the_order_of_features_does_not_matter() -> None:
    rows = []
    for order in (["input_ids", "user_ids"], ["user_ids", "input_ids"]):
        tables = build()
        optimizer = SparseAdagrad(tables, lr=0.1)
        batch = tables({name: ids(*INT64).roll(len(name)) for name in order})
        sum((batch[name].square() * k).sum() for k, name in enumerate(sorted(order), 1)).backward()  # type: ignore[union-attr]
        optimizer.step()
        rows.append(
            [batch[name].detach() for name in sorted(order)] + [tables.export_rows(t)["rows"] for t in ("item", "user")]
        )
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    assert not torch.equal(rows[0][2], rows[0][3])


def test_s28_deepcopy_is_independent_and_keeps_state() -> None:
    tables = build()
    optimizer = SparseAdamW(tables, lr=0.1)
    tables({"input_ids": ids(1, 2)})["input_ids"].sum().backward()
    optimizer.step()
    twin = copy.deepcopy(nn.ModuleList([tables]).eval())[0]
    assert isinstance(twin, DynamicEmbeddingCollection) and not twin.training and twin.optimizer is None
    before = twin.export_rows("item")
    torch.testing.assert_close(before, tables.export_rows("item"), rtol=0, atol=0)
    assert "exp_avg" in before and before["step"].tolist() == [1, 1]
    tables.train()
    tables({"input_ids": ids(1, 2, 3)})["input_ids"].sum().backward()
    optimizer.step()
    torch.testing.assert_close(twin.export_rows("item"), before, rtol=0, atol=0)
    SparseAdamW(twin, lr=0.1)
    assert tables.num_rows() == 3 and twin.num_rows() == 2


def test_s28_two_collections_of_one_name_do_not_meet() -> None:
    a, b = build(), build()
    look_up(a, "input_ids", ids(1))
    assert (a.num_rows(), b.num_rows()) == (1, 0)


# ---------------------------------------------------------------------- training needs an optimizer


def test_training_without_an_optimizer_is_refused_before_anything_changes() -> None:
    tables = build()
    with pytest.raises(ValueError, match="no sparse optimizer is attached"):
        tables({"input_ids": ids(1)})
    assert tables.num_rows() == 0
    with pytest.raises(ValueError, match="no sparse optimizer"):
        tables.prepare([{"input_ids": ids(1)}]).fetch()


def test_one_optimizer_at_a_time_and_state_of_the_same_kind_stays() -> None:
    tables = build()
    optimizer = SparseAdagrad(tables, lr=0.1)
    tables({"input_ids": ids(1)})["input_ids"].sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="SparseAdagrad is attached"):
        SparseSGD(tables, lr=0.1)
    state = tables.export_rows("item")["sum"]
    del optimizer
    gc.collect()
    SparseAdagrad(tables, lr=0.2)
    assert torch.equal(tables.export_rows("item")["sum"], state) and state.min() > 0


# ---------------------------------------------------------------------- rows in and out


def test_export_is_sorted_and_import_restores() -> None:
    tables = build()
    optimizer = SparseAdamW(tables, lr=0.1)
    values = torch.cat([ids(*INT64), torch.arange(100)])
    tables({"input_ids": values})["input_ids"].square().sum().backward()
    optimizer.step()
    saved = tables.export_rows("item")
    order = sorted(saved["ids"].tolist(), key=lambda i: (int(bucket(ids(i))), i))
    assert saved["ids"].tolist() == order and set(saved) == {"ids", "rows", "exp_avg", "exp_avg_sq", "step"}
    other = build()
    _keep = SparseAdamW(other, lr=0.1)
    assert other.import_rows("item", saved) == len(order)
    torch.testing.assert_close(other.export_rows("item"), saved, rtol=0, atol=0)
    other.import_rows("item", {"ids": saved["ids"][:1], "rows": torch.ones(1, 4)})  # s20: absent state starts afresh
    first = {k: v[0] for k, v in other.export_rows("item").items()}
    assert first["rows"].tolist() == [1.0] * 4 and first["exp_avg"].tolist() == [0.0] * 4 and first["step"] == 0
    assert other.export_rows("item")["step"].sum() == len(order) - 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": torch.ones(1, 4)}, "lack \\['ids'\\]"),
        ({"ids": ids(1, 2), "rows": torch.ones(1, 4)}, "must be torch.float32 \\[2, 4\\]"),
        ({"ids": ids(1), "rows": torch.ones(1, 4).half()}, "float16"),
        ({"ids": ids(1), "rows": torch.ones(1, 4), "sum": torch.ones(1, 1)}, "no 'sum'"),
        ({"ids": ids(1, 1), "rows": torch.ones(2, 4)}, "not distinct"),
    ],
)
def test_s20_rows_that_do_not_fit_are_refused(values: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().import_rows("item", values)


@pytest.mark.parametrize("backend", ["naive", "host"])
@pytest.mark.parametrize("step", [-1, 2**31 - 1])
def test_s20_counts_of_updates_that_no_row_can_have_are_refused(backend: str, step: int) -> None:
    tables = build(backend=backend)
    values = {"ids": ids(1), "rows": torch.ones(1, 4), "step": torch.tensor([step], dtype=torch.int32)}
    with pytest.raises(ValueError, match=f"'step' of table 'item' has {step}: .* leave it out"):
        tables.import_rows("item", values)
    assert tables.num_rows() == 0


AFTER_CLOSE: dict[str, Callable[[DynamicEmbeddingCollection], object]] = {
    "forward": lambda tables: look_up(tables, "input_ids", ids(1)),
    "prepare": lambda tables: tables.prepare([{"input_ids": ids(1)}]),
    "num_rows": lambda tables: tables.num_rows(),
    "total_rows": lambda tables: tables.total_rows("item"),
    "memory_bytes": lambda tables: tables.memory_bytes(),
    "ids": lambda tables: tables.ids("item"),
    "export_rows": lambda tables: tables.export_rows("item"),
    "import_rows": lambda tables: tables.import_rows("item", {"ids": ids(1), "rows": torch.ones(1, 4)}),
    "shared_row": lambda tables: tables.shared_row("item"),
    "erase": lambda tables: tables.erase("item", ids(1)),
    "pin": lambda tables: tables.pin("item", ids(1)),
    "drain_evicted": lambda tables: tables.drain_evicted("item"),
    "statistics": lambda tables: tables.statistics(),
    "attach": lambda tables: SparseAdagrad(tables, lr=0.1),
}


@pytest.mark.parametrize("name", AFTER_CLOSE)
@pytest.mark.parametrize("backend", ["naive", "host"])
def test_use_after_close_raises(backend: str, name: str) -> None:
    policies: dict[str, Any] = {"admission": {"min_count": 2}, "eviction": {"kind": "lru", "every": 1}, "max_rows": 9}
    table = TableConfig(name="item", embedding_dim=4, unknown="shared", **policies)
    tables = DynamicEmbeddingCollection([table], [FeatureConfig(name="input_ids", table="item")], backend=backend)
    optimizer = SparseAdagrad(tables, lr=0.1)
    tables({"input_ids": ids(1, 1)})["input_ids"].sum().backward()
    optimizer.step()
    del optimizer
    tables.close()
    tables.close()
    with pytest.raises(RuntimeError, match="closed"), torch.no_grad():
        AFTER_CLOSE[name](tables)
    assert "closed" in repr(tables)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"input_ids": torch.tensor([1.5])}], "must be int64, got torch.float32"),
        ([{"input_ids": torch.tensor([1], dtype=torch.int32)}], "convert with .long()"),
        ([{"input_ids": torch.tensor([True])}], "got torch.bool"),
        ([{"input_ids": [1]}], "int64 tensor, got list"),
        ([{}, {"items": ids(1)}], "unknown feature 'items' in micro-batch 1"),
        ({"input_ids": ids(1)}, "pass \\[batch\\]"),
        ([ids(1)], "mapping feature -> ids, got Tensor"),
        ([{"input_ids": ids(1), "user_ids": torch.ones(1, dtype=torch.int64, device="meta")}], "one device"),
    ],
)
def test_bad_batches_are_refused_with_the_value(batches: object, message: str) -> None:
    tables = build()
    with pytest.raises(ValueError, match=message):
        tables.prepare(batches)  # type: ignore[arg-type]
    assert tables.num_rows() == 0


def test_bad_configurations_are_refused() -> None:
    item = TableConfig(name="item", embedding_dim=4)
    with pytest.raises(ValueError, match="uses table 'nope'"):
        DynamicEmbeddingCollection([item], [FeatureConfig(name="a", table="nope")])
    with pytest.raises(ValueError, match="two tables are called 'item'"):
        DynamicEmbeddingCollection([item, TableConfig(name="item", embedding_dim=8)], [])
    with pytest.raises(ValueError, match="two features are called 'a'"):
        DynamicEmbeddingCollection([item], [FeatureConfig(name="a", table="item")] * 2)
    with pytest.raises(ValueError, match="at least one table"):
        DynamicEmbeddingCollection([], [])
    with pytest.raises(ValueError, match="no table 'x'"):
        build().export_rows("x")
    dicts = DynamicEmbeddingCollection([item.to_dict()], [{"name": "a", "table": "item"}])
    assert dicts.table_names == ["item"]


def test_misuse_of_a_step() -> None:
    tables = build().eval()
    step = tables.prepare([{"input_ids": ids(1)}])
    with pytest.raises(RuntimeError, match="fetch"):
        step[0]
    step.fetch()
    with pytest.raises(RuntimeError, match="fetched already"):
        step.fetch()
    with pytest.raises(IndexError):
        step[1]
    with pytest.raises(KeyError, match="not in this micro-batch"):
        step[0]["user_ids"]
    assert [list(batch) for batch in step] == [["input_ids"]] and "1: [" not in repr(tables)
