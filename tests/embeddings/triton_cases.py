"""Law 5: tables in GPU memory equal the naive ones. Run by test_triton_storage.py, on a GPU or interpreted."""

import copy
import random
from typing import Any

import hypothesis.strategies as st
import policy_table
import pytest
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseAdamW, TableConfig
from grzoo.embeddings.kernels import RowInit, Slot, TableStorage, get_backend
from grzoo.embeddings.kernels.naive import NaiveStorage
from grzoo.embeddings.kernels.rounding import row_keys, table_keys
from grzoo.embeddings.kernels.rules import RULES
from grzoo.embeddings.kernels.triton.function_kernels import claim_first_kernel
from grzoo.embeddings.kernels.triton.launch import blocks, default_device
from grzoo.embeddings.kernels.triton.storage import TritonStorage
from hypothesis import given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

DEVICE = default_device()
TRITON, NAIVE = get_backend("triton"), get_backend("naive")
LOW, HIGH = -(2**63), 2**63 - 1
EXTREMES = [0, -1, 1, -2, LOW, LOW + 1, HIGH, HIGH - 1, 2**32, -(2**32)]
QUANTILES = torch.randn(2, 65536, generator=torch.Generator().manual_seed(0)).unbind()
INITS = [
    RowInit("uniform", 77, 0.05),
    RowInit("quantile", -5, 0.02, QUANTILES[0]),
    RowInit("constant", 3, 0.25),
    RowInit("quantile", 2**63 - 1, 1.5, QUANTILES[1]),
    RowInit("quantile", 9, 0.1, QUANTILES[0]),
]
SHIFT = 4  # sixteen rows a chunk: tests cross many borders
HYPER = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "adagrad": {"lr": 0.1, "eps": 1e-8},
    "rowwise_adagrad": {"lr": 0.1, "eps": 1e-8},
    "adam": {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "step": 0},
    "adamw": {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "step": 0},
}


def rule_slots(name: str, dim: int) -> list[Slot]:
    return {
        "sgd": [Slot("momentum_buffer", dim)],
        "adagrad": [Slot("sum", dim, 0.1)],
        "rowwise_adagrad": [Slot("sum", 1, 0.1)],
    }.get(name, [Slot("exp_avg", dim), Slot("exp_avg_sq", dim)])


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN, or a row far outside."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(
            float("nan") if tensor.is_floating_point() else 12_345 if tensor.itemsize == 2 else 123_456_789
        )

    monkeypatch.setattr(torch, "empty", poisoned)


def pairs(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """n distinct pairs, the first with extreme ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(LOW, HIGH, (n,), generator=generator)
    ids[: len(EXTREMES)] = torch.tensor(EXTREMES)[:n]
    return torch.randint(0, len(INITS), (n,), generator=generator, dtype=torch.int32), ids


def twins(dim: int, slots: list[Slot] | None = None) -> tuple[TritonStorage, NaiveStorage]:
    storages = TritonStorage(dim, INITS, shift=SHIFT), NaiveStorage(dim, INITS)
    for storage in storages:
        storage.set_slots(slots or [])
    return storages


def assert_close(triton: torch.Tensor, naive: torch.Tensor) -> None:
    torch.testing.assert_close(triton, naive, rtol=2e-6, atol=2e-7)


# ---- initial values, insertion, growth ----


@pytest.mark.parametrize("dim", [1, 3, 16, 100])
def test_initial_values_are_those_of_the_naive_table_bit_for_bit(dim: int) -> None:
    table, naive = twins(dim)
    tables, ids = pairs(70)
    absent = table.gather_or_initial(torch.full_like(ids, -1), tables, ids)
    handles, inserted = table.find_or_insert(tables, ids)
    expected = naive.gather(naive.find_or_insert(tables, ids)[0])
    assert inserted == len(table) == 70 and torch.equal(handles, torch.arange(70))
    assert torch.equal(table.gather(handles), expected) and torch.equal(absent, expected)
    some = torch.where(ids % 2 == 0, handles, -1)
    table.scatter(handles, torch.zeros(70, dim), {})
    mixed = table.gather_or_initial(some, tables, ids)
    assert torch.equal(mixed, torch.where((ids % 2 == 0)[:, None], 0.0, expected))


def test_every_int64_is_an_id_and_tables_are_apart() -> None:
    ids = torch.tensor(EXTREMES).repeat(3)
    tables = torch.arange(3, dtype=torch.int32).repeat_interleave(len(EXTREMES))
    table, _ = twins(2)
    assert (table.find(tables, ids) == -1).all()
    handles, inserted = table.find_or_insert(tables, ids)
    assert inserted == len(ids) and torch.equal(table.find(tables, ids), handles)
    assert table.erase(tables[:10], ids[:10]) == 10
    assert torch.equal(table.find(tables, ids), torch.cat([torch.full((10,), -1), handles[10:]]))


def test_growth_moves_no_handle_and_no_value() -> None:
    table, naive = twins(4)
    tables, ids = pairs(3000)
    steps = [0, 1, 17, 500, 512, 513, 1025, 3000]
    parts = [table.find_or_insert(tables[a:b], ids[a:b])[0] for a, b in zip(steps, steps[1:], strict=False)]
    early = table.gather(parts[0])
    handles = torch.cat(parts)
    assert torch.equal(handles, torch.arange(3000)) and torch.equal(table.find(tables, ids), handles)
    assert table._open.rehashes == 3 and 2 * len(table) <= table._open.capacity
    expected = naive.gather(naive.find_or_insert(tables, ids)[0])
    assert torch.equal(table.gather(handles), expected) and torch.equal(early, expected[:1])
    border = torch.tensor([15, 16, -1, 2999, 0, 15])
    assert torch.equal(table.gather(border), naive.gather(border))


def test_finding_changes_nothing() -> None:
    table, _ = twins(3)
    tables, ids = pairs(40)
    table.find_or_insert(tables[:20], ids[:20])
    before = table._open.records.clone(), table.memory_bytes()
    assert (table.find(tables, ids)[20:] == -1).all()
    assert torch.equal(before[0], table._open.records) and before[1] == table.memory_bytes()


# ---- erase ----


def home_of(table: int, id_: int, capacity: int) -> int:
    """`bits.home_slot` in Python ints."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    bits = mix((id_ + 0x5851F42D4C957F2D) & mask)
    return mix((bits + table * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & mask) % capacity


def test_erasing_from_long_runs_leaves_no_tombstone_and_loses_no_key() -> None:
    table, _ = twins(1)
    capacity = table._open.capacity
    near = [{i for i in range(60_000) if (home_of(t, i, capacity) + 4) % capacity < 8} for t in range(2)]  # of the end
    twice = sorted(near[0] & near[1])[:2]  # one id in two tables
    ids = torch.tensor([*twice, *sorted(near[0] - near[1])[:8], *twice, *sorted(near[1] - near[0])[:8]])
    tables = torch.arange(2, dtype=torch.int32).repeat_interleave(10)
    handles, _ = table.find_or_insert(tables, ids)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    for gone in order[:19].split([1, 3, 10, 5]):
        assert table.erase(tables[gone], ids[gone]) == len(gone)
        handles[gone] = -1
        assert torch.equal(table.find(tables, ids), handles)
        tags = table._open.records[:, 1]
        assert ((tags == -1) | (tags >= 0)).all() and int((tags >= 0).sum()) == len(table) == int((handles >= 0).sum())
    assert table.erase(tables, ids) == 1 and (table._open.records[:, 1] == -1).all()


def test_a_row_that_is_inserted_again_starts_afresh() -> None:
    table, naive = twins(4, [Slot("sum", 1, 0.5)])
    tables, ids = pairs(30)
    first = naive.gather(naive.find_or_insert(tables, ids)[0])
    handles, _ = table.find_or_insert(tables, ids)
    table.update("rowwise_adagrad", handles, torch.ones(30, 4), **HYPER["rowwise_adagrad"])
    assert table.gather_slot("step", handles).eq(1).all()
    assert table.erase(tables.repeat(2), ids.repeat(2)) == 30 and len(table) == 0
    again, inserted = table.find_or_insert(tables, ids)
    assert inserted == 30 and torch.equal(again, handles)  # the freed rows by number, wherever their slots were
    assert torch.equal(table.gather(again), first)
    assert table.gather_slot("step", again).eq(0).all() and table.gather_slot("sum", again).eq(0.5).all()


def test_memory_stays_constant_under_steady_deletion() -> None:
    table, _ = twins(2)
    sizes = []
    for k in range(5):
        table.find_or_insert(*pairs(100, seed=k))
        if k:
            table.erase(*pairs(100, seed=k - 1))
        sizes.append(table.memory_bytes())
    assert max(sizes[3:]) <= 1.01 * sizes[2] and table._open.rehashes == 0


def test_handles_do_not_depend_on_the_history_of_slots() -> None:
    def run(batches: list[int]) -> torch.Tensor:
        table, _ = twins(1)
        tables, ids = pairs(60)
        for a, b in zip([0, *batches], [*batches, 60], strict=True):
            table.find_or_insert(tables[a:b], ids[a:b])
        table.erase(tables[10:40].flip(0), ids[10:40].flip(0))
        return torch.cat([table.find_or_insert(*pairs(50, seed=3))[0], *table.keys()])

    assert torch.equal(run([1, 2]), run([30]))


# ---- slots, updates, arguments ----


def test_slots_change_after_insertion() -> None:
    table, naive = twins(6)
    tables, ids = pairs(140)
    wide, narrow = Slot("exp_avg", 6, 0.1), Slot("sum", 1, 9.0)
    layouts = [Slot("sum", 1, 0.5)], [wide, narrow], [Slot("exp_avg", 6, 7.0)], [Slot("sum", 6, 2.0)], []
    for k, layout in enumerate(layouts, start=1):
        n = 25 * k
        for storage in (table, naive):
            storage.set_slots(layout)
            handles, _ = storage.find_or_insert(tables[:n], ids[:n])
            for slot in layout:
                values = storage.gather_slot(slot.name, handles)
                storage.scatter(handles[:20], None, {slot.name: values[:20] * 2 + ids[:20, None].remainder(5)})
            storage.scatter(handles, None, {"step": (ids[:n, None] % 9).to(torch.int32)})
        a, b = (storage.find(tables[:n], ids[:n]) for storage in (table, naive))
        for name in [slot.name for slot in layout] + ["step"]:
            assert torch.equal(table.gather_slot(name, a), naive.gather_slot(name, b)), name


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("dim", [1, 7, 32])
def test_updates_equal_the_naive_rules(name: str, dim: int) -> None:
    storages = table, naive = twins(dim, rule_slots(name, dim))
    generator = torch.Generator().manual_seed(1)
    tables, ids = pairs(60)
    for step in range(4):
        chosen = torch.randperm(60, generator=generator)[: [40, 1, 0, 50][step]]
        grads = torch.randn(len(chosen), dim, generator=generator)
        for storage in storages:
            handles, _ = storage.find_or_insert(tables[chosen], ids[chosen])
            storage.update(name, handles, grads, **HYPER[name])
    a, b = table.find(tables, ids), naive.find(tables, ids)
    assert torch.equal(a < 0, b < 0)
    a, b = a[a >= 0], b[b >= 0]
    assert_close(table.gather(a), naive.gather(b))
    for slot in rule_slots(name, dim):
        assert_close(table.gather_slot(slot.name, a), naive.gather_slot(slot.name, b))
    assert torch.equal(table.gather_slot("step", a), naive.gather_slot("step", b))


@pytest.mark.parametrize(
    ("name", "change"),
    [("sgd", {"momentum": 0.0}), ("sgd", {"momentum": 0.0, "weight_decay": 0.0}), ("adam", {"step": 7}),
     ("adam", {"weight_decay": 0.0}), ("adamw", {"step": 100_000}), ("adamw", {"beta1": 0.0, "beta2": 0.5})],
)  # fmt: skip
def test_hyperparameters_equal_the_naive_rules(name: str, change: dict[str, float]) -> None:
    storages = table, naive = twins(12, rule_slots(name, 12))
    tables, ids = pairs(50)
    grads = torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(1))
    rows = []
    for storage in storages:
        handles, _ = storage.find_or_insert(tables, ids)
        storage.scatter(handles, None, {"step": torch.arange(50, dtype=torch.int32)[:, None] * 1000})
        for grad in grads:
            storage.update(name, handles, grad, **{**HYPER[name], **change})
        rows.append(storage.gather(handles))
    assert_close(rows[0], rows[1])


def test_gather_writes_where_it_is_told() -> None:
    table, _ = twins(3)
    handles, _ = table.find_or_insert(*pairs(10))
    rows = torch.randn(10, 3)
    table.scatter(handles, rows, {})
    out, columns = torch.empty(10, 3), torch.empty(3, 10).T
    assert table.gather(handles, out=out) is out and torch.equal(out, rows)
    assert table.gather(handles, out=columns) is columns and torch.equal(columns, rows)


def test_empty_calls() -> None:
    table, _ = twins(5, [Slot("sum", 1)])
    none, no_tables = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    assert table.find(no_tables, none).shape == (0,)
    assert table.find_or_insert(no_tables, none)[1] == 0 and table.erase(no_tables, none) == 0
    assert table.erase(*pairs(3)) == 0
    assert table.gather(none).shape == (0, 5) and table.gather(torch.tensor([-1, -1])).eq(0).all()
    assert table.gather_or_initial(none, no_tables, none).shape == (0, 5)
    table.update("rowwise_adagrad", none, torch.zeros(0, 5), **HYPER["rowwise_adagrad"])
    assert [t.shape for t in table.keys()] == [(0,)] * 3 and len(table) == 0
    check_unique(none, None)
    check_unique(none, no_tables)
    assert TRITON.segment_sum(torch.zeros(0, 5), none, 3).eq(0).all()
    assert TRITON.segment_sum(torch.zeros(0, 5), none, 0).shape == (0, 5)


def test_use_after_close_raises() -> None:
    table, _ = twins(5)
    table.find_or_insert(*pairs(10))
    table.close()
    table.close()
    for use in (lambda: len(table), table.keys, lambda: table.gather(torch.tensor([0])), lambda: table.find(*pairs(1))):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_bad_arguments_raise() -> None:
    table, _ = twins(4)
    handles, _ = table.find_or_insert(*pairs(10))
    for tables, ids in ((torch.zeros(1, dtype=torch.int32), torch.tensor([1.0])), (torch.zeros(1), torch.tensor([1]))):
        with pytest.raises(ValueError, match="ids must be int64"):
            table.find(tables, ids)
    with pytest.raises(TypeError, match="takes exactly"):
        table.update("sgd", handles, torch.ones(10, 4), lr=1.0)
    with pytest.raises(ValueError, match="unknown rule"):
        table.update("lion", handles, torch.ones(10, 4), lr=1.0)
    with pytest.raises(ValueError, match="must have width"):
        table.set_slots([Slot("sum", 2)])
    with pytest.raises(ValueError, match="positive"):
        TritonStorage(0, INITS)
    with pytest.raises(ValueError, match="unknown initial law"):
        TritonStorage(1, [RowInit("cauchy", 1, 1.0)])


def test_an_allocation_that_fails_leaves_the_table_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = twins(4)
    tables, ids = pairs(30)
    handles, _ = table.find_or_insert(tables, ids)
    size = table.memory_bytes()

    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(table._open, "_empty_records", fail)
        table.find_or_insert(*pairs(2000, seed=1))
    assert len(table) == 30 and torch.equal(table.find(tables, ids), handles) and table.memory_bytes() == size
    assert table.find_or_insert(*pairs(2000, seed=1))[1] >= 1990


# ---- functions ----


def check_unique(ids: torch.Tensor, tables: torch.Tensor | None) -> None:
    found, expected = TRITON.unique(ids, tables), NAIVE.unique(ids, tables)
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_unique_equals_the_naive_one(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    choices = data.draw(st.lists(st.sampled_from(EXTREMES) | st.integers(LOW, HIGH), min_size=1, max_size=20))
    ids = torch.tensor(data.draw(st.lists(st.sampled_from(choices), min_size=n, max_size=n)))
    tables = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), dtype=torch.int32)
    check_unique(ids, data.draw(st.sampled_from([None, tables])))


@pytest.mark.parametrize("distinct", [1, 100, 10**9])
def test_unique_of_many(distinct: int) -> None:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(-distinct, distinct, (5000,), generator=generator)
    check_unique(ids, None)
    check_unique(ids, torch.randint(0, 3, (5000,), generator=generator, dtype=torch.int32))


def test_the_first_position_wins_a_slot_that_a_later_one_claimed() -> None:
    ids = torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    owners = torch.full((1024,), -1, dtype=torch.int32, device=DEVICE)
    slots = torch.zeros(500, dtype=torch.int64, device=DEVICE)
    last = torch.tensor([(ids == i).nonzero()[-1] for i in ids], dtype=torch.int32, device=DEVICE)
    first = torch.tensor([(ids == i).nonzero()[0] for i in ids], dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        args = owners, 1024, ids, ids, slots, 500
        claim_first_kernel[blocks(500, 64)](*args, TABLES=False, BLOCK=64, num_warps=1)
        assert torch.equal(owners[slots], first)
        owners[slots] = last  # as if the programs had come in the opposite order


@pytest.mark.parametrize(("n", "dim", "segments"), [(1, 1, 1), (120, 3, 10), (90, 20, 60), (70, 33, 1), (4, 8, 9)])
def test_segment_sum_has_the_bits_of_the_naive_one(n: int, dim: int, segments: int) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(n, dim, generator=generator)
    index = (torch.rand(n, generator=generator) ** 3 * segments).long()
    assert torch.equal(TRITON.segment_sum(values, index, segments), NAIVE.segment_sum(values, index, segments))
    start = torch.randn(segments, dim, generator=generator)
    expected = NAIVE.segment_sum(values, index, segments, start.clone())
    for out in (start.clone(), start.T.contiguous().T):
        assert TRITON.segment_sum(values, index, segments, out) is out and torch.equal(out, expected)


# ---- any history ----


def split(keys: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([t for t, _ in keys], dtype=torch.int32), torch.tensor([i for _, i in keys], dtype=torch.int64)


class Twins(RuleBasedStateMachine):
    """Random operations on a table of the device, a naive one, and a Python dict of what must be there."""

    dim = 5
    batches = {"seed": st.integers(0, 2**31), "n": st.sampled_from([0, 1, 7, 40, 250])}

    @initialize(layout=st.sampled_from(list(RULES)))
    def start(self, layout: str) -> None:
        self.rule_name = layout
        self.storages: tuple[TableStorage, ...] = twins(self.dim, rule_slots(layout, self.dim))
        self.alive: dict[tuple[int, int], int] = {}

    def draw(self, seed: int, n: int) -> list[tuple[int, int]]:
        """n pairs among a few hundred, some of them extreme."""
        generator = random.Random(seed)
        numbers = [*range(300), *EXTREMES, *EXTREMES]
        return [(generator.randrange(3), generator.choice(numbers)) for _ in range(n)]

    @rule(**batches)
    def insert(self, seed: int, n: int) -> None:
        keys = list(dict.fromkeys(self.draw(seed, n)))
        new = sum(key not in self.alive for key in keys)
        results = [storage.find_or_insert(*split(keys)) for storage in self.storages]
        assert [inserted for _, inserted in results] == [new, new]
        for key, handle in zip(keys, results[0][0].tolist(), strict=True):
            assert self.alive.setdefault(key, handle) == handle

    @rule(**batches)
    def find(self, seed: int, n: int) -> None:
        keys = self.draw(seed, n)
        found = [storage.find(*split(keys)) for storage in self.storages]
        assert found[0].tolist() == [self.alive.get(key, -1) for key in keys]
        assert_close(self.storages[0].gather(found[0]), self.storages[1].gather(found[1]))

    @rule(**batches)
    def erase(self, seed: int, n: int) -> None:
        keys = self.draw(seed, n)
        gone = {key for key in keys if key in self.alive}
        assert [storage.erase(*split(keys)) for storage in self.storages] == [len(gone)] * 2
        for key in gone:
            del self.alive[key]

    @precondition(lambda self: self.alive)
    @rule(**batches)
    def update(self, seed: int, n: int) -> None:
        tables, ids = split(random.Random(seed).sample(list(self.alive), min(n, len(self.alive))))
        grads = torch.randn(len(ids), self.dim, generator=torch.Generator().manual_seed(seed))
        for storage in self.storages:
            storage.update(self.rule_name, storage.find(tables, ids), grads, **HYPER[self.rule_name])

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "storages"):
            assert len(self.storages[0]) == len(self.storages[1]) == len(self.alive)
            found = {(t, i): h for t, i, h in zip(*(x.tolist() for x in self.storages[0].keys()), strict=True)}
            assert found == self.alive

    def teardown(self) -> None:
        if not hasattr(self, "storages"):
            return
        table, naive = self.storages
        tables, ids, handles = (x.cpu() for x in table.keys())
        expected = naive.find(tables, ids)
        assert_close(table.gather(handles), naive.gather(expected))
        for slot in rule_slots(self.rule_name, self.dim):
            assert_close(table.gather_slot(slot.name, handles), naive.gather_slot(slot.name, expected))
        assert torch.equal(table.gather_slot("step", handles), naive.gather_slot("step", expected))


def test_any_history_gives_the_table_of_the_naive_twin() -> None:
    run_state_machine_as_test(Twins, settings=settings(max_examples=8, stateful_step_count=40, deadline=None))


# ---- in a collection ----


def test_a_collection_trains_the_same_rows_as_with_naive_tables() -> None:
    results = []
    for placement in ("device", "host"):
        configs = [TableConfig(name=name, embedding_dim=4, placement=placement) for name in ("item", "user")]
        features = [FeatureConfig(name="history", table="item"), FeatureConfig(name="user", table="user")]
        collection = DynamicEmbeddingCollection(configs, features, backend="naive")
        optimizer = SparseAdamW(collection, lr=0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            history = torch.randint(-9, 9, (3, 7), generator=generator)
            found = collection({"history": history, "user": history[:, 0]})
            (found["history"].square().sum() + found["user"].sum()).backward()
            optimizer.step()
        results.append([collection.export_rows(name) for name in ("item", "user")])
        twin = copy.deepcopy(collection)
        for a, b in zip(*(c.export_rows("item").values() for c in (collection, twin)), strict=True):
            assert torch.equal(a, b)
        collection.eval()
        assert collection({"history": torch.tensor([99])})["history"].eq(0).all()
    for table, naive in zip(*results, strict=True):
        assert torch.equal(table.pop("ids"), naive.pop("ids")) and torch.equal(table.pop("step"), naive.pop("step"))
        for name, values in naive.items():
            assert_close(table[name], values)


# ---- bfloat16 rows ----


def test_s15_special_values_are_rounded_as_the_definition_says() -> None:
    from grzoo.embeddings.kernels.rounding import round_stochastic
    from grzoo.embeddings.kernels.triton.halves import round_rows

    bits = torch.randint(-(2**31), 2**31 - 1, (40, 9), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    values = bits.view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-45, -1e-45])
    values[0], values[1] = special, -special
    keys, steps = torch.arange(40) * 7919 - 5, torch.arange(40)
    expected = round_stochastic(values, keys, steps)
    found = round_rows(values.to(DEVICE), keys.to(DEVICE), steps.to(DEVICE)).cpu()
    assert torch.equal(found.isnan(), expected.isnan())
    same = found.view(torch.int16) == expected.view(torch.int16)
    assert same[~expected.isnan()].all()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dim", [1, 7, 16])
def test_s15_bfloat16_rows_have_the_bits_of_the_naive_ones(dim: int, rounding: str) -> None:
    storages = TritonStorage(dim, INITS, rounding, shift=SHIFT), NaiveStorage(dim, INITS, rounding)
    tables, ids = pairs(70)
    keys = row_keys(table_keys(INITS), tables, ids)
    found = []
    for storage in storages:
        handles, _ = storage.find_or_insert(tables, ids)
        storage.scatter(handles[:3], torch.full((3, dim), 1.003), {})
        for step in range(3):
            grads = torch.randn(60, dim, generator=torch.Generator().manual_seed(step))
            some = slice(step, step + 60)
            storage.update("sgd", handles[some], grads, keys[some], lr=0.01, momentum=0.0, weight_decay=0.0)
        found.append(storage.gather(torch.cat([handles, torch.tensor([-1])])))
    assert torch.equal(*found) and torch.equal(found[0], found[0].bfloat16().float())
    absent = storages[0].gather_or_initial(torch.full_like(ids, -1), tables, ids)
    plain = NaiveStorage(dim, INITS)
    assert torch.equal(absent, plain.gather(plain.find_or_insert(tables, ids)[0]).bfloat16().float())


def test_s15_the_state_of_bfloat16_rows_is_float32() -> None:
    slots = [Slot("exp_avg", 8), Slot("exp_avg_sq", 8)]
    hyper = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 0.0}
    storages = TritonStorage(8, INITS, "nearest", shift=SHIFT), NaiveStorage(8, INITS, "nearest")
    tables, ids = pairs(70)
    found = []
    for storage in storages:
        storage.set_slots(slots)
        handles, _ = storage.find_or_insert(tables, ids)
        for step in range(3):
            grads = torch.randn(70, 8, generator=torch.Generator().manual_seed(step))
            storage.update("adamw", handles, grads, **hyper)
        state = storage.gather_slot("exp_avg_sq", handles), storage.gather_slot("step", handles)
        found.append((storage.gather(handles), *state))
    assert_close(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("kind", [{"kind": "ttl", "steps": 2, "every": 1}, {"kind": "lfu", "every": 2, "half_life": 2}])
def test_s8_s17_policies_keep_the_rows_that_they_keep_of_naive_tables(kind: dict[str, Any]) -> None:
    tables = [
        policy_table.build(admission={"min_count": 3, "forget_after": 5}, eviction=kind, max_rows=9, placement=where)
        for where in ("device", "host")
    ]
    for step in range(6):
        ids = torch.randint(step, step + 8, (12,), generator=torch.Generator().manual_seed(step)).tolist()
        for collection, optimizer in tables:
            policy_table.train(collection, optimizer, ids)
    (triton, _), (naive, _) = tables
    triton.erase("a", triton.ids("a")[:2])
    naive.erase("a", naive.ids("a")[:2])
    assert policy_table.use(triton) == policy_table.use(naive) != {}
    assert policy_table.candidates(triton) == policy_table.candidates(naive) != {}
    found, expected = triton.drain_evicted("a"), naive.drain_evicted("a")
    assert found.ids.tolist() == expected.ids.tolist() != [] and torch.equal(found.steps, expected.steps)


def test_the_norm_of_gradients_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from grzoo.embeddings.kernels import triton as backend

    monkeypatch.setattr(backend, "_NORM_ELEMENTS", 7)
    for values in (torch.randn(5, 3), torch.empty(0, 3), torch.full((4, 4), 1e25)):
        found = backend.TritonBackend().squared_norm(values)
        assert isinstance(found, torch.Tensor) and found.dtype == torch.float64 and found.ndim == 0
        torch.testing.assert_close(found, values.double().square().sum(), rtol=1e-14, atol=0.0)
    assert not backend.TritonBackend().squared_norm(torch.tensor([[1.0] * 9, [torch.nan] * 9])).isfinite()
