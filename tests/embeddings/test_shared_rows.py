"""unknown="shared": ids without a row share a trained one. S2, S4, S6, S8, S9, S12, S20, S27, S28."""

import copy
from pathlib import Path

import pytest
import torch
from grzoo.embeddings import (
    DynamicEmbeddingCollection,
    FeatureConfig,
    SparseAdamW,
    SparseOptimizer,
    SparseSGD,
    TableConfig,
)
from grzoo.embeddings.files import DamagedFile
from grzoo.embeddings.io import load_tables, save_tables
from torch import Tensor, nn

TABLES = [
    TableConfig(name="plain", embedding_dim=4),
    TableConfig(name="item", embedding_dim=4, unknown="shared", admission={"min_count": 2}),
    TableConfig(name="user", embedding_dim=4, unknown="shared", admission={"min_count": 2}),
]
FEATURES = [FeatureConfig(name=config.name, table=config.name) for config in TABLES]
KNOWN = torch.tensor([0, 1, 2, -1, 2**63 - 1])  # none of them stands for "unknown"
UNKNOWN = torch.tensor([77, -(2**63), 78])


def build(backend: str = "naive", **options: bool) -> DynamicEmbeddingCollection:
    tables = DynamicEmbeddingCollection(TABLES, FEATURES, backend=backend, seed=1, **options)
    with torch.no_grad():
        tables({name: KNOWN.repeat(2) for name in ("item", "user", "plain")})
    return tables


def look_up(tables: DynamicEmbeddingCollection, feature: str, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return tables({feature: ids}, insert=False)[feature]


def train(tables: DynamicEmbeddingCollection, optimizer: SparseOptimizer, batches: list[dict[str, Tensor]]) -> None:
    """One step of a loss whose gradient differs by occurrence, without insertion."""
    step = tables.prepare(batches, insert=False).fetch()
    for k, batch in enumerate(batches):
        for name in batch:
            loss_of(step[k][name]).backward()
    optimizer.step()


def loss_of(rows: Tensor) -> Tensor:
    return (rows.square() * torch.arange(1.0, 5.0)).sum() + rows.sum()


def test_s4_all_unknown_ids_of_a_table_have_its_row_and_tables_have_their_own() -> None:
    tables = build().eval()
    rows = {name: look_up(tables, name, UNKNOWN) for name in tables.table_names}
    assert torch.equal(rows["item"], tables.shared_row("item")["rows"].expand(3, 4)) and rows["item"].abs().min() > 0
    assert not torch.equal(rows["item"], rows["user"]) and rows["plain"].abs().sum() == 0
    assert tables.num_rows() == 15 and tables.ids("item").numel() == 5  # S2, S4: no id, and no row of the table
    assert torch.equal(build().eval().shared_row("item")["rows"], rows["item"][:1])  # S1
    with pytest.raises(ValueError, match="unknown ids of table 'plain' get 'zeros', not a 'shared' row"):
        tables.shared_row("plain")


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("backend", ["naive", "host"])
def test_s6_s27_gradients_of_unknown_ids_sum_in_it_as_those_of_one_entry_of_a_dense_embedding(
    backend: str, merge: bool
) -> None:
    tables = build(backend, merge=merge)
    dense = nn.Embedding.from_pretrained(
        torch.cat([look_up(tables, "item", KNOWN), tables.shared_row("item")["rows"]]), freeze=False
    )
    other = tables.shared_row("user")["rows"]
    optimizer, static = SparseAdamW(tables, lr=0.1), torch.optim.AdamW(dense.parameters(), lr=0.1, weight_decay=0.01)
    for _ in range(3):
        train(tables, optimizer, [{"item": torch.cat([KNOWN, UNKNOWN])}])
        static.zero_grad()
        loss_of(dense(torch.tensor([0, 1, 2, 3, 4, 5, 5, 5]))).backward()
        static.step()
    torch.testing.assert_close(look_up(tables, "item", KNOWN), dense.weight[:5].detach())
    torch.testing.assert_close(tables.shared_row("item")["rows"], dense.weight[5:].detach())
    assert tables.shared_row("item")["step"].tolist() == [3]
    assert torch.equal(tables.shared_row("user")["rows"], other) and tables.num_rows() == 15  # lazy


def test_s9_law1_micro_batches_and_the_norm_for_clipping() -> None:
    one, two = build(), build()
    optimizers = [SparseSGD(tables, lr=0.1, max_grad_norm=0.5) for tables in (one, two)]
    train(one, optimizers[0], [{"item": torch.cat([UNKNOWN, KNOWN])}])
    train(two, optimizers[1], [{"item": UNKNOWN[:1]}, {"item": torch.cat([UNKNOWN[1:], KNOWN])}])
    torch.testing.assert_close(one.shared_row("item")["rows"], two.shared_row("item")["rows"])
    assert optimizers[0].grad_norm == pytest.approx(optimizers[1].grad_norm) and optimizers[0].grad_norm > 0.5
    dense = nn.Embedding.from_pretrained(
        torch.cat([look_up(build(), "item", KNOWN), build().shared_row("item")["rows"]])
    )
    dense.weight.requires_grad_()
    loss_of(dense(torch.tensor([5, 5, 5, 0, 1, 2, 3, 4]))).backward()
    assert optimizers[0].grad_norm == pytest.approx(dense.weight.grad.norm().item())


def test_s8_an_id_trains_the_shared_row_until_it_is_admitted() -> None:
    tables = build()
    optimizer = SparseSGD(tables, lr=0.1)
    before = tables.shared_row("item")["rows"]
    loss_of(tables({"item": UNKNOWN})["item"]).backward()
    optimizer.step()
    after = tables.shared_row("item")["rows"]
    gradient = 2 * before * torch.arange(1.0, 5.0) + 1
    torch.testing.assert_close(after, before - 0.1 * 3 * gradient)
    rows = tables({"item": UNKNOWN[:1]})["item"]  # met for the second time
    assert tables.num_rows("item") == len(KNOWN) + 1 and not torch.equal(rows, after)
    rows.sum().backward()
    optimizer.step()
    assert torch.equal(tables.shared_row("item")["rows"], after)


def test_a_shared_row_that_training_would_not_reach_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="the shared row of table 'x' stays as it is: without admission"):
        TableConfig(name="x", embedding_dim=2, unknown="shared")


def test_s12_a_step_without_unknown_ids_leaves_it_alone() -> None:
    tables = build()
    optimizer = SparseAdamW(tables, lr=0.1)
    before = tables.shared_row("item")
    train(tables, optimizer, [{"item": KNOWN, "plain": UNKNOWN}])
    optimizer.step()
    assert all(torch.equal(v, tables.shared_row("item")[k]) for k, v in before.items())


@pytest.mark.parametrize("state", [True, False])
def test_s20_it_is_saved_and_loaded_with_its_table(tmp_path: Path, state: bool) -> None:
    tables, fresh = build(), build(merge=False)
    optimizers = SparseAdamW(tables, lr=0.1), SparseAdamW(fresh, lr=0.1)
    train(tables, optimizers[0], [{"item": UNKNOWN, "user": UNKNOWN}])
    save_tables(tables, tmp_path, state=state)
    load_tables(fresh, tmp_path, state=state)
    for name in ("item", "user"):
        for part, values in fresh.shared_row(name).items():
            same = torch.equal(values, tables.shared_row(name)[part])
            assert same if state or part == "rows" else not same, part
    if not state:  # an export has checksums
        file = tmp_path / "embeddings-shared.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DamagedFile, match="checksum of embeddings-shared"):
            load_tables(fresh, tmp_path, state=False)
        file.write_bytes(content)
    configs = [TableConfig(name=config.name, embedding_dim=4) for config in TABLES]
    zeros = DynamicEmbeddingCollection(configs, FEATURES, seed=1)
    load_tables(zeros, tmp_path, state=False)
    assert look_up(zeros.eval(), "item", UNKNOWN).abs().sum() == 0
    save_tables(zeros, tmp_path, state=False)
    assert not (tmp_path / "embeddings-shared.safetensors").exists()


def test_s28_a_copy_has_its_own() -> None:
    tables = build()
    optimizer = SparseSGD(tables, lr=1.0)
    train(tables, optimizer, [{"item": UNKNOWN}])
    twin = copy.deepcopy(tables)
    kept = twin.shared_row("item")["rows"]
    assert torch.equal(kept, tables.shared_row("item")["rows"])
    train(tables, optimizer, [{"item": UNKNOWN}])
    assert torch.equal(kept, twin.shared_row("item")["rows"]) and not torch.equal(
        kept, tables.shared_row("item")["rows"]
    )
