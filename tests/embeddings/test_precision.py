"""bfloat16 rows with float32 state: S1, S4, S5, S15, S20, S27 and laws 1 and 5."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from grzoo.embeddings import (
    DynamicEmbeddingCollection,
    FeatureConfig,
    SparseAdam,
    SparseSGD,
    TableConfig,
)
from grzoo.embeddings.io import load_tables, map_tables, save_tables
from grzoo.embeddings.kernels import RowInit, Slot, get_backend
from grzoo.embeddings.kernels.base import ROUNDINGS
from grzoo.embeddings.kernels.rounding import round_nearest, round_stochastic, row_keys, table_keys
from safetensors import safe_open
from torch import Tensor

BACKENDS = ("naive", "host")
NORMAL = {"kind": "normal", "std": 1.0}
INITS = [RowInit("uniform", 77, 1.0), RowInit("constant", 3, 0.3)]


def rows_of(tables: DynamicEmbeddingCollection, name: str) -> Tensor:
    """Rows sorted by id."""
    values = tables.export_rows(name)
    return values["rows"][values["ids"].argsort()]


def is_bfloat16(values: Tensor) -> bool:
    return torch.equal(values, values.to(torch.bfloat16).float())


# ---------------------------------------------------------------------- rounding


def test_s15_stochastic_rounding_gives_a_neighbour_and_the_value_on_average() -> None:
    values = torch.tensor([[1.001, -1.001, 3e-5, 0.0, 1.5, torch.inf, -torch.inf, torch.nan]])
    many = values.expand(40_000, -1).contiguous()
    rounded = round_stochastic(many, torch.arange(40_000), torch.full((40_000,), 3)).float()
    exact = rounded[:, 3:7]
    assert (exact == values[:, 3:7]).all() and rounded[:, 7].isnan().all()
    for column in range(3):
        seen = rounded[:, column].unique()
        low, high = seen.tolist()
        assert low < values[0, column] < high and high - low <= 2**-7 * values[0, column].abs()
        error = (rounded[:, column].double().mean() - values[0, column]).abs()
        assert error < 5 * (high - low) / 2 / 200, "five standard deviations of the mean"


def test_s15_rounding_depends_on_row_step_and_column_and_on_nothing_else() -> None:
    values, keys, first = torch.full((500, 6), 1.001), torch.arange(500), torch.ones(500, dtype=torch.int64)
    once = round_stochastic(values, keys, first)
    again = round_stochastic(values.flip(0), keys.flip(0), first).flip(0)
    assert torch.equal(once, again) and 0.15 < (once != round_stochastic(values, keys, first + 1)).float().mean() < 0.3
    assert torch.equal(once[:, :2], round_stochastic(values[:, :2].contiguous(), keys, first))
    assert torch.equal(round_nearest(values), values.to(torch.bfloat16))


# ---------------------------------------------------------------------- backends


def update(backend: str, rounding: str, rule: str, slots: list[Slot], dim: int, **hyper: float) -> dict[str, Tensor]:
    """Rows and state after five updates, in the order of ids."""
    storage = get_backend(backend).create(dim, INITS, rounding)
    storage.set_slots(slots)
    generator = torch.Generator().manual_seed(dim)
    ids = torch.randint(-(2**63), 2**63 - 1, (700,), generator=generator)
    tables = torch.randint(0, 2, (700,), generator=generator, dtype=torch.int32)
    handles, _ = storage.find_or_insert(tables, ids)
    storage.scatter(handles[:3], torch.full((3, dim), 1.003), {})
    for _ in range(5):
        grads = torch.randn(700, dim, generator=generator)
        some = torch.randperm(700, generator=generator)[:600]
        keys = row_keys(table_keys(INITS), tables[some], ids[some]) if rounding == "stochastic" else None
        storage.update(rule, handles[some], grads[some].contiguous(), keys, **hyper)
    state = {slot.name: storage.gather_slot(slot.name, handles) for slot in slots}
    return {"rows": storage.gather(torch.cat([handles, torch.tensor([-1])])), **state}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dim", [1, 3, 16, 37])
def test_s15_law5_backends_round_to_the_same_bits(
    dim: int, rounding: str, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    hyper = {"lr": 0.01, "momentum": 0.0, "weight_decay": 0.0}
    naive, host = (update(backend, rounding, "sgd", [], dim, **hyper)["rows"] for backend in BACKENDS)
    assert torch.equal(naive, host) and is_bfloat16(host) and host[-1].abs().sum() == 0


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("rule", "slots", "hyper"),
    [
        ("adagrad", [Slot("sum", 24)], {"lr": 0.1, "eps": 1e-8}),
        ("rowwise_adagrad", [Slot("sum", 1)], {"lr": 0.1, "eps": 1e-8}),
        (
            "adamw",
            [Slot("exp_avg", 24), Slot("exp_avg_sq", 24)],
            {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 0.0},
        ),
    ],
)
def test_s15_state_is_float32_and_rows_follow_it(
    rule: str, slots: list[Slot], hyper: dict[str, float], rounding: str
) -> None:
    naive, host = (update(backend, rounding, rule, slots, 24, **hyper) for backend in BACKENDS)
    for slot in slots:
        torch.testing.assert_close(host[slot.name], naive[slot.name], rtol=2e-6, atol=2e-7)
        assert not is_bfloat16(host[slot.name])
    different = host["rows"] != naive["rows"]  # where a last bit before rounding decides
    torch.testing.assert_close(host["rows"], naive["rows"], rtol=2**-7, atol=1e-7)
    assert different.float().mean() < 0.01 and is_bfloat16(host["rows"])


# ---------------------------------------------------------------------- collections


def build(backend: str = "host", merge: bool = True, **options: str) -> DynamicEmbeddingCollection:
    configs = [
        TableConfig(name="plain", embedding_dim=6, initializer=NORMAL),
        TableConfig(name="half", embedding_dim=6, initializer=NORMAL, row_dtype="bfloat16", **options),  # type: ignore[arg-type]
        TableConfig(name="other", embedding_dim=6, initializer=NORMAL, row_dtype="bfloat16", unknown="initial"),
    ]
    features = [FeatureConfig(name=config.name, table=config.name) for config in configs]
    return DynamicEmbeddingCollection(configs, features, backend=backend, seed=1, merge=merge)


def train(tables: DynamicEmbeddingCollection, micro_batches: int = 1, steps: int = 3) -> None:
    optimizer = SparseAdam(tables, lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(0, 40, (64,), generator=generator)
        batches = [{name: part for name in tables.table_names} for part in ids.chunk(micro_batches)]
        step = tables.prepare(batches).fetch()
        for k in range(micro_batches):
            sum(rows.square().sum() for rows in step[k].values()).backward()  # type: ignore[union-attr]
        optimizer.step()


def test_s1_s5_initial_values_are_those_of_float32_rounded_to_the_nearest() -> None:
    tables = build().eval()
    ids = torch.arange(50)
    unknown = tables({"other": ids})["other"]
    look = tables({name: ids for name in tables.table_names}, insert=True)
    assert torch.equal(unknown, look["other"]) and is_bfloat16(look["other"])  # S4
    wide = TableConfig(name="half", embedding_dim=6, initializer=NORMAL)
    float32 = DynamicEmbeddingCollection([wide], [FeatureConfig(name="half", table="half")], seed=1).eval()
    assert torch.equal(look["half"], float32({"half": ids}, insert=True)["half"].bfloat16().float())
    assert not is_bfloat16(look["plain"]) and len(tables.physical) == 2, "only equal precisions are merged"


def test_law1_s27_rows_do_not_depend_on_micro_batches_merging_and_backend() -> None:
    expected = build()
    train(expected)
    for tables, micro_batches in ((build(merge=False), 1), (build("naive"), 1), (build(), 3)):
        train(tables, micro_batches)
        for name in tables.table_names:
            torch.testing.assert_close(rows_of(tables, name), rows_of(expected, name), rtol=2**-7, atol=1e-6)
        assert (rows_of(tables, "half") != rows_of(expected, "half")).float().mean() < 0.02
        state = tables.export_rows("half")
        assert is_bfloat16(state["rows"]) and not is_bfloat16(state["exp_avg"]) and state["rows"].dtype == torch.float32


def test_s15_small_updates_are_not_lost_unless_rounded_to_the_nearest() -> None:
    moved = {}
    for rounding in ROUNDINGS:
        config = TableConfig(
            name="item", embedding_dim=16, initializer={"kind": "constant", "value": 1.0}, row_dtype="bfloat16",
            row_rounding=rounding,
        )  # fmt: skip
        tables = DynamicEmbeddingCollection([config], [FeatureConfig(name="item", table="item")], seed=1)
        optimizer = SparseSGD(tables, lr=2.0**-12)  # an eighth of the distance to the next lower bfloat16, 2^-8
        for _ in range(64):
            (-tables({"item": torch.arange(100)})["item"]).sum().backward()
            optimizer.step()
        moved[rounding] = float(rows_of(tables, "item").mean()) - 1.0
    assert moved["nearest"] == 0.0
    assert moved["stochastic"] == pytest.approx(64 * 2.0**-12, rel=0.1)


def test_s20_files_hold_what_the_rows_hold(tmp_path: Path) -> None:
    tables = build()
    train(tables)
    save_tables(tables, tmp_path, state=False)
    with safe_open(tmp_path / "embeddings-00001-of-00001.safetensors", framework="pt") as file:
        dtypes = {name: file.get_slice(f"{name}.rows").get_dtype() for name in tables.table_names}
    assert dtypes == {"plain": "F32", "half": "BF16", "other": "BF16"}
    again = build(merge=False)
    load_tables(again, tmp_path, state=False)
    assert all(torch.equal(rows_of(again, name), rows_of(tables, name)) for name in tables.table_names)


@pytest.mark.parametrize("to", ["float32", "bfloat16"])
@pytest.mark.parametrize("unknown", ["zeros", "shared"])
@pytest.mark.parametrize("backend", ["naive", "host"])
def test_s20_a_checkpoint_loads_at_the_other_precision(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, backend: str, to: str, unknown: str
) -> None:
    def build_as(dtype: str) -> tuple[DynamicEmbeddingCollection, SparseAdam]:
        admission = {"min_count": 2} if unknown == "shared" else None
        config = TableConfig(
            name="item", embedding_dim=6, initializer=NORMAL, row_dtype=dtype, unknown=unknown, admission=admission
        )
        tables = DynamicEmbeddingCollection(
            [config], [FeatureConfig(name="item", table="item")], backend=backend, seed=1
        )
        return tables, SparseAdam(tables, lr=0.02)

    def step(tables: DynamicEmbeddingCollection, optimizer: SparseAdam, ids: torch.Tensor) -> None:
        tables({"item": ids})["item"].square().sum().backward()
        optimizer.step()

    saved, optimizer = build_as("bfloat16" if to == "float32" else "float32")
    for start in (0, 10, 20, 15):
        step(saved, optimizer, torch.arange(start, start + 30))
    save_tables(saved, tmp_path, state=True)
    loaded, optimizer = build_as(to)
    load_tables(loaded, tmp_path)
    assert "row_dtype of table 'item'" in caplog.text
    expected, found = saved.export_rows("item"), loaded.export_rows("item")
    if unknown == "shared":
        expected |= {f"shared {part}": values for part, values in saved.shared_row("item").items()}
        found |= {f"shared {part}": values for part, values in loaded.shared_row("item").items()}
    for name, values in expected.items():
        is_row = name.endswith("rows") and to == "bfloat16"
        torch.testing.assert_close(found[name], values.bfloat16().float() if is_row else values, rtol=0, atol=0)
    mapped = DynamicEmbeddingCollection(
        [loaded.tables["item"]], [FeatureConfig(name="item", table="item")], backend=backend, seed=1
    ).eval()
    map_tables(mapped, tmp_path)
    ids, looked_up = torch.arange(45), loaded.eval()({"item": torch.arange(45)})["item"]
    assert torch.equal(mapped({"item": ids})["item"], looked_up)
    step(loaded.train(), optimizer, torch.arange(40))  # goes on


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="row_dtype of table 'x' must be one of"):
        TableConfig(name="x", embedding_dim=2, row_dtype="float16")
    with pytest.raises(ValueError, match="row_rounding of table 'x' must be one of"):
        TableConfig(name="x", embedding_dim=2, row_dtype="bfloat16", row_rounding="up")
    with pytest.warns(UserWarning, match="row_rounding of table 'x' has no effect: its rows are float32"):
        TableConfig(name="x", embedding_dim=2, row_rounding="nearest")
