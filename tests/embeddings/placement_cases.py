"""Tables with placement="device" against the same in host memory. Run by test_placement.py under Triton's interpreter.

The simulated device (simulated_device.py) refuses what a GPU would, and counts what the host would wait for.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import placement_jobs
import pytest
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, Jagged, SparseAdam, TableConfig
from grzoo.embeddings.io import load_tables, map_tables, save_tables
from simulated_device import DEVICE, SimulatedDevice, simulated_device
from spawn import spawn
from torch import Tensor

HOST = torch.device("cpu")
STEPS = 2
ADMISSION = {"min_count": 2, "forget_after": 3}
TABLES: dict[str, dict[str, Any]] = {
    "item": {"embedding_dim": 4},
    "user": {"embedding_dim": 4, "unknown": "initial"},
    "tag": {"embedding_dim": 3},
    "half": {"embedding_dim": 5, "row_dtype": "bfloat16", "unknown": "initial"},
    "rare": {"embedding_dim": 6, "admission": ADMISSION, "unknown": "shared"},
    "recent": {"embedding_dim": 2, "max_rows": 4, "eviction": {"kind": "lru", "every": 2}},
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedDevice]:
    with simulated_device(monkeypatch) as found:
        yield found


def build(*on_device: str, lr: Any = 0.1, **options: Any) -> tuple[DynamicEmbeddingCollection, SparseAdam]:
    where = {name: "device" if name in on_device else "host" for name in TABLES}
    tables = [TableConfig(name=name, placement=where[name], **fields) for name, fields in TABLES.items()]
    features = [FeatureConfig(name=name, table=name) for name in TABLES]
    features += [FeatureConfig(name="basket", table="tag", pooling="sum")]
    features += [FeatureConfig(name="genres", table="item", pooling="mean")]
    collection = DynamicEmbeddingCollection(tables, features, backend="naive", **options)
    return collection, SparseAdam(collection, lr=lr, max_grad_norm=20.0)


def batch(seed: int, where: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {n: torch.randint(-4, 9, (2, 5), generator=generator) for n in TABLES}
    made["recent"] = made["recent"] % 3 + 2 * (seed // 2)  # drifting, and few: the rows of a step are not evicted
    made = {name: ids.to(where) for name, ids in made.items()}
    bags = Jagged.from_lengths(torch.randint(9, (6,), generator=generator), torch.tensor([2, 0, 4]))
    made["basket"] = Jagged(
        bags.values.to(where), bags.offsets.to(where), torch.randn(6, generator=generator).to(where)
    )
    made["genres"] = made["item"][:, :3]
    return made


def train(
    collection: DynamicEmbeddingCollection, optimizer: SparseAdam, where: torch.device, steps: int = STEPS
) -> None:
    for k in range(steps):
        step = collection.prepare([batch(2 * k, where), batch(2 * k + 1, where)]).fetch()
        for micro in (step[0], step[1]):
            sum(rows.square().sum() for rows in micro.values()).backward()
        assert optimizer.reduce()
        optimizer.step()


def everything(collection: DynamicEmbeddingCollection) -> dict[str, dict[str, Tensor]]:
    found = {name: collection.export_rows(name) for name in TABLES}
    found["rare"] |= {f"shared {part}": values for part, values in collection.shared_row("rare").items()}
    return found


def assert_same(found: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Mapping[str, Tensor]]) -> None:
    for table, columns in expected.items():
        assert len(columns["ids"]), f"{table} has no rows: the test tests nothing"
        for column, values in columns.items():
            torch.testing.assert_close(found[table][column], values, rtol=2e-5, atol=2e-6, msg=f"{table} {column}")


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    collection, optimizer = build()
    train(collection, optimizer, HOST)
    return everything(collection)


def test_tables_on_a_device_train_as_in_host_memory(
    device: SimulatedDevice, expected: dict[str, dict[str, Tensor]]
) -> None:
    collection, optimizer = build(*TABLES)
    assert all(table.device == DEVICE for table in collection.physical)
    train(collection, optimizer, DEVICE)
    assert_same(everything(collection), expected)


@pytest.mark.parametrize(("where", "merge"), [(DEVICE, True), (HOST, False)])
def test_tables_of_both_placements_serve_one_model_wherever_its_ids_are(
    device: SimulatedDevice, expected: dict[str, dict[str, Tensor]], where: torch.device, merge: bool
) -> None:
    collection, optimizer = build("item", "half", "rare", merge=merge)
    assert {table.placement for table in collection.physical} == {"host", "device"}
    train(collection, optimizer, where)
    assert_same(everything(collection), expected)


def test_tables_of_two_placements_are_not_merged(device: SimulatedDevice) -> None:
    collection, _ = build("item")
    groups = [[config.name for config in table.configs] for table in collection.physical]
    assert ["item"] in groups and ["user"] in groups
    assert ["item", "user"] in [[config.name for config in table.configs] for table in build(*TABLES)[0].physical]


def test_rates_differ_between_merged_tables_on_a_device(device: SimulatedDevice) -> None:
    rates = dict.fromkeys(TABLES, 0.1) | {"user": 0.3}
    results = []
    for names in ([], TABLES):
        collection, optimizer = build(*names, lr=rates)
        train(collection, optimizer, HOST, steps=2)
        results.append(everything(collection))
    assert_same(results[1], results[0])


def test_a_step_with_ids_in_host_memory_is_fetched_to_the_model(device: SimulatedDevice) -> None:
    """The ids need not visit the device when the tables are in host memory."""
    results = []
    for target in (None, DEVICE):
        collection, optimizer = build()
        step = collection.prepare([batch(0, HOST)]).fetch(target)
        rows = step[0]
        assert all(values.device == (target or HOST) for values in rows.values())
        sum(values.square().sum() for values in rows.values()).backward()
        leaf, index = step[0].rows("item")
        assert leaf.device == index.device == (target or HOST)
        optimizer.step()
        results.append({name: collection.export_rows(name) for name in ("item", "user", "tag", "half")})
    assert_same(results[1], results[0])


def test_s4_evaluation_on_a_device_gives_what_unknown_ids_give_and_changes_nothing(device: SimulatedDevice) -> None:
    answers = []
    for names in ([], TABLES):
        collection, optimizer = build(*names)
        train(collection, optimizer, HOST, steps=2)
        before = collection.num_rows()
        collection.eval()
        given = {name: torch.tensor([[3, 77, -5]]) for name in TABLES}
        with torch.no_grad():
            answers.append({name: rows.cpu() for name, rows in collection(given).items()})
        assert collection.num_rows() == before
        assert collection.statistics()["user"]["unknown_rate"] > 0
    for name, rows in answers[0].items():
        torch.testing.assert_close(answers[1][name], rows, rtol=2e-5, atol=2e-6)
    assert not answers[0]["user"][0, 1].eq(0).all()


def test_statistics_erase_pins_and_log_are_those_of_host_memory(device: SimulatedDevice) -> None:
    results = []
    for names in ([], TABLES):
        collection, optimizer = build(*names)
        collection.pin("recent", torch.tensor([0]))
        train(collection, optimizer, HOST, steps=4)
        erased = tuple(collection.erase("item", torch.tensor([1, 2, 3, 999])))
        collection.unpin("recent", torch.tensor([0]))
        log = collection.drain_evicted("recent")
        results.append((erased, log.ids.tolist(), log.steps.tolist(), collection.statistics()))
    assert results[0] == results[1] and results[0][1] != []


def test_rows_that_wait_for_gradients_are_erased_safely(device: SimulatedDevice) -> None:
    results = []
    for names in ([], TABLES):
        collection, optimizer = build(*names)
        step = collection.prepare([batch(0, HOST)]).fetch()
        sum(rows.square().sum() for rows in step[0].values()).backward()
        collection.erase("item", collection.ids("item")[::2])
        optimizer.step()
        results.append(everything(collection) | {"recent": collection.export_rows("recent")})
    for table in ("item", "user", "tag"):
        for a, b in zip(results[0][table].values(), results[1][table].values(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_files_do_not_depend_on_placement(device: SimulatedDevice, tmp_path: Path) -> None:
    saved: list[dict[str, bytes]] = []
    for number, names in enumerate(([], TABLES)):
        collection, optimizer = build(*names, lr=0.0)  # without rounding of updates: the same bits
        train(collection, optimizer, HOST, steps=2)
        for name in TABLES:  # moments are rounded by each backend in its own way
            columns = collection.export_rows(name)
            zeros = {slot: torch.zeros_like(columns[slot]) for slot in ("exp_avg", "exp_avg_sq")}
            collection.import_rows(name, columns | zeros)
        folder = tmp_path / str(number)
        save_tables(collection, folder, state=True)
        saved.append({path.name: path.read_bytes() for path in sorted(folder.iterdir()) if "shared" not in path.name})
    assert saved[0] == saved[1]
    for number, names in enumerate((TABLES, [])):  # what was saved in one memory goes to the other
        collection, optimizer = build(*names)
        load_tables(collection, tmp_path / str(number))
        again = tmp_path / f"again-{number}"
        save_tables(collection, again, state=True)
        assert {p.name: p.read_bytes() for p in again.iterdir() if "shared" not in p.name} == saved[number]
    collection, optimizer = build(*TABLES)
    del optimizer
    map_tables(collection, tmp_path / "0")
    assert all(table.device == HOST for table in collection.physical)
    assert collection.eval()({"item": torch.tensor([1])}, insert=False)["item"].shape == (1, 4)


def test_s28_a_copy_stays_on_the_device(device: SimulatedDevice) -> None:
    collection, optimizer = build(*TABLES)
    train(collection, optimizer, HOST, steps=2)
    twin = copy.deepcopy(collection)
    assert all(table.device == DEVICE for table in twin.physical)
    assert_same(everything(twin), everything(collection))


@pytest.mark.parametrize("backends", ["gloo", "nccl", "both"])
def test_law1_tables_of_both_placements_on_two_ranks_whatever_the_group_takes(
    expected: dict[str, dict[str, Tensor]], backends: str
) -> None:
    """Gloo takes tensors in host memory, NCCL those on a GPU; one rank brings its ids in host memory."""
    on_device = ["item", "user", "half", "rare", "recent"]
    (first, statistics), (second, _) = spawn(2, placement_jobs.train, backends, on_device)
    for table, columns in expected.items():
        ids = first[table]["ids"] + second[table]["ids"]
        assert sorted(ids) == sorted(columns["ids"].tolist()) and 0 < len(first[table]["ids"]) < len(ids)
        order, mine = torch.tensor(ids).argsort(), columns["ids"].argsort()
        rtol = 1e-4 if TABLES[table].get("row_dtype") is None else 2**-7  # one step of bfloat16
        for column in first[table]:
            found = torch.tensor(first[table][column] + second[table][column])[order]
            torch.testing.assert_close(found.to(columns[column].dtype), columns[column][mine], rtol=rtol, atol=1e-5)
    assert statistics["item"]["owner_dedup_ratio"] > 1 and statistics["rare"]["unknown_rate"] > 0


# ---- what the host waits for ----


def step_costs(device: SimulatedDevice, tables: int, ids: int, *, train: bool = True) -> tuple[int, int]:
    """Waits and launches of a step on tables of one width without policies, ids on the device, some of them new."""
    names = [f"t{k}" for k in range(tables)]
    configs = [TableConfig(name=name, embedding_dim=4, placement="device") for name in names]
    collection = DynamicEmbeddingCollection(configs, [FeatureConfig(name=name, table=name) for name in names])
    optimizer = SparseAdam(collection, lr=0.1)
    collection.train(train)
    for k in range(2):
        given = {name: (torch.arange(ids) + 7 * k).to(DEVICE) for name in names}
        device.waits.clear()
        device.launches.clear()
        step = collection.prepare([given]).fetch()
        if train:
            counted = device.launches.copy()
            sum(rows.sum() for rows in step[0].values()).backward()  # a sum by rows for each feature
            device.launches = counted
            optimizer.step()
    return device.waits.total(), device.launches.total()


def test_the_host_waits_for_three_numbers_whatever_the_tables_and_ids(device: SimulatedDevice) -> None:
    """How many ids are distinct, how many of those are new, the norm of the gradients."""
    (waits, launches), bigger = step_costs(device, 1, 20), step_costs(device, 1, 300)
    assert waits == bigger[0] == 3 and launches == bigger[1]
    several, more = step_costs(device, 2, 20), step_costs(device, 5, 20)
    assert several[0] == more[0] == 4, "and, of merged tables, how many ids are of each"
    assert several[1] == more[1] == launches


def test_evaluation_waits_for_the_distinct_ids_alone(device: SimulatedDevice) -> None:
    assert step_costs(device, 1, 20, train=False)[0] == 1
    assert step_costs(device, 2, 20, train=False)[0] == step_costs(device, 5, 20, train=False)[0] == 2
