"""Law 5: the C++ tables equal the naive ones, whatever the number of threads, the instruction set and the history."""

import os
import random

import hypothesis.strategies as st
import pytest
import torch
from grzoo.embeddings.kernels import BackendUnavailable, RowInit, Slot, TableStorage, get_backend
from grzoo.embeddings.kernels.naive import NaiveStorage
from grzoo.embeddings.kernels.rules import RULES
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

try:
    HOST = get_backend("host")
except BackendUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

from grzoo.embeddings.kernels.host.functions import segment_sum, take_rows, unique  # noqa: E402
from grzoo.embeddings.kernels.host.library import library  # noqa: E402
from grzoo.embeddings.kernels.host.storage import HostStorage  # noqa: E402

NAIVE = get_backend("naive")
ISAS = [isa for isa in ("baseline", "avx2", "avx512") if library().grzoo_set_isa(isa.encode()) == 0]
library().grzoo_set_isa(ISAS[-1].encode())
LOW, HIGH = -(2**63), 2**63 - 1
QUANTILES = torch.randn(65536, generator=torch.Generator().manual_seed(0))
INITS = [RowInit("uniform", 77, 0.05), RowInit("quantile", -5, 0.02, QUANTILES), RowInit("constant", 3, 0.25)]
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
def restore_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRZOO_NUM_THREADS", "1")
    yield
    library().grzoo_set_isa(ISAS[-1].encode())
    library().grzoo_set_memory_limit(0)


@pytest.fixture(params=[1, 2, 5], ids=lambda n: f"threads={n}")
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("GRZOO_NUM_THREADS", str(request.param))
    return request.param


def pairs(n: int, seed: int = 0, tables: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(LOW, HIGH, (n,), generator=generator)
    return torch.randint(0, tables, (n,), generator=generator, dtype=torch.int32), ids


def assert_close(host: torch.Tensor, naive: torch.Tensor) -> None:
    torch.testing.assert_close(host, naive, rtol=2e-6, atol=2e-7)


# ---- initial values and insertion ----


@pytest.mark.parametrize("dim", [1, 3, 16, 64, 100])
def test_initial_values_are_those_of_the_naive_table_bit_for_bit(dim: int, threads: int) -> None:
    tables, ids = pairs(5000)
    ids[:5] = torch.tensor([0, -1, 1, LOW, HIGH])
    host, naive = HostStorage(dim, INITS), NaiveStorage(dim, INITS)
    handles, inserted = host.find_or_insert(tables, ids)
    expected, _ = naive.find_or_insert(tables, ids)
    assert inserted == len(ids) == len(host) and handles.unique().numel() == len(ids)
    assert torch.equal(host.gather(handles), naive.gather(expected))


def test_insertion_gives_the_same_handles_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, ids = pairs(30_000)
    results = []
    for count in ("1", "2", "3"):
        monkeypatch.setenv("GRZOO_NUM_THREADS", count)
        host = HostStorage(4, INITS)
        host.find_or_insert(tables[:10_000], ids[:10_000])
        host.erase(tables[5_000:6_000], ids[5_000:6_000])
        results.append(torch.cat([host.find_or_insert(tables, ids)[0], host.keys()[1]]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_every_int64_is_an_id_and_tables_are_apart() -> None:
    ids = torch.tensor([0, -1, 1, LOW, HIGH, LOW + 1, 2**32, -(2**32)]).repeat(3)
    tables = torch.arange(3, dtype=torch.int32).repeat_interleave(8)
    host = HostStorage(2, INITS)
    assert (host.find(tables, ids) == -1).all()
    handles, inserted = host.find_or_insert(tables, ids)
    assert inserted == 24 and torch.equal(host.find(tables, ids), handles)
    assert host.erase(tables[:8], ids[:8]) == 8
    assert (host.find(tables, ids)[:8] == -1).all() and torch.equal(host.find(tables, ids)[8:], handles[8:])


def test_growth_over_many_chunks_moves_no_handle_and_no_value(threads: int) -> None:
    host = HostStorage(256, INITS[:1])  # 4,096 rows a chunk
    tables, ids = pairs(20_000, tables=1)
    handles = torch.cat([host.find_or_insert(tables[i : i + 777], ids[i : i + 777])[0] for i in range(0, 20_000, 777)])
    assert torch.equal(handles, torch.arange(20_000))
    assert torch.equal(host.find(tables, ids), handles)
    naive = NaiveStorage(256, INITS[:1])
    expected, _ = naive.find_or_insert(tables, ids)
    assert torch.equal(host.gather(handles), naive.gather(expected))
    border = torch.tensor([4095, 4096, 8191, 8192, -1, 19_999, 0])
    rows = host.gather(border)
    assert (rows[4] == 0).all() and torch.equal(rows[0], naive.gather(expected[4095:4096])[0])


def test_a_pair_that_comes_twice_in_one_call_gets_one_row() -> None:
    host = HostStorage(2, INITS)
    handles, inserted = host.find_or_insert(torch.zeros(4, dtype=torch.int32), torch.tensor([5, 6, 5, 7]))
    assert inserted == 3 == len(host) and handles[0] == handles[2]
    again, _ = host.find_or_insert(torch.zeros(2, dtype=torch.int32), torch.tensor([8, 9]))
    assert torch.cat([handles, again]).unique().numel() == 5


def test_ids_that_share_the_high_bits_of_their_hash_are_kept_apart() -> None:
    mask = 2**64 - 1

    def unmix(z: int) -> int:  # the inverse of mix64
        z ^= (z >> 31) ^ (z >> 62)
        z = z * pow(0x94D049BB133111EB, -1, 2**64) & mask
        z ^= (z >> 27) ^ (z >> 54)
        z = z * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask
        return z ^ (z >> 30) ^ (z >> 60)

    offset = 0xA24BAED4963EE407  # of table 0 in src/common.h
    raw = [(unmix((7 << 40) + k) - offset) & mask for k in range(3000)]
    ids = torch.tensor([x - 2**64 if x >> 63 else x for x in raw])
    tables = torch.zeros(len(ids), dtype=torch.int32)
    host = HostStorage(1, INITS)
    handles, _ = host.find_or_insert(tables, ids)
    gone = torch.randperm(3000)[:1500]
    assert host.erase(tables[gone], ids[gone]) == 1500
    handles[gone] = -1
    assert torch.equal(host.find(tables, ids), handles)


# ---- erase, slots, close ----


def test_a_row_that_is_inserted_again_starts_afresh() -> None:
    host = HostStorage(4, INITS)
    host.set_slots([Slot("sum", 1, 0.5)])
    table, one = torch.zeros(1, dtype=torch.int32), torch.tensor([42])
    handle, _ = host.find_or_insert(table, one)
    first = host.gather(handle)
    host.update("rowwise_adagrad", handle, torch.ones(1, 4), **HYPER["rowwise_adagrad"])
    assert not torch.equal(host.gather(handle), first) and host.gather_slot("step", handle).item() == 1
    host.erase(table, one)
    handle, _ = host.find_or_insert(table, one)
    assert torch.equal(host.gather(handle), first)
    assert host.gather_slot("step", handle).item() == 0 and host.gather_slot("sum", handle).item() == 0.5


def test_memory_stays_constant_under_steady_deletion() -> None:
    host = HostStorage(8, INITS[:1])
    generator = random.Random(0)
    alive: list[int] = []
    sizes = []
    for _ in range(60):
        new = [generator.randrange(LOW, HIGH) for _ in range(500)]
        host.find_or_insert(torch.zeros(500, dtype=torch.int32), torch.tensor(new))
        alive += new
        if len(alive) > 2000:
            gone, alive = alive[:500], alive[500:]
            assert host.erase(torch.zeros(500, dtype=torch.int32), torch.tensor(gone)) == 500
        sizes.append(host.memory_bytes())
    assert len(host) == 2000 and max(sizes[30:]) <= sizes[20] * 1.05


def test_slots_change_after_insertion(threads: int) -> None:
    host, naive = HostStorage(64, INITS), NaiveStorage(64, INITS)
    tables, ids = pairs(40_000)
    wide, narrow = Slot("exp_avg", 64, 0.1), Slot("sum", 1, 9.0)
    for layout in ([Slot("sum", 1, 0.5)], [wide, narrow], [Slot("exp_avg", 64, 7.0)], []):
        for storage in (host, naive):
            handles, _ = storage.find_or_insert(tables, ids)
            storage.set_slots(layout)
            for slot in layout:
                values = storage.gather_slot(slot.name, handles)
                changed = values[:20_000] * 2 + ids[:20_000, None].remainder(5)
                storage.scatter(handles[:20_000], None, {slot.name: changed})
            steps = (ids[:, None] % 9).to(torch.int32)
            storage.scatter(handles, None, {"step": steps})
        a, _ = host.find_or_insert(tables, ids)
        b, _ = naive.find_or_insert(tables, ids)
        assert torch.equal(host.gather(a), naive.gather(b))
        for name in [slot.name for slot in layout] + ["step"]:
            assert torch.equal(host.gather_slot(name, a), naive.gather_slot(name, b)), name


def test_scatter_overwrites_rows() -> None:
    host = HostStorage(3, INITS)
    handles, _ = host.find_or_insert(*pairs(10))
    rows = torch.randn(10, 3)
    host.scatter(handles, rows, {})
    assert torch.equal(host.gather(handles), rows)
    out = torch.empty(10, 3)
    assert host.gather(handles, out=out) is out and torch.equal(out, rows)


def test_sorted_keys_and_whole_rows_are_those_of_the_naive_table(threads: int) -> None:
    tables, ids = pairs(30_000)
    ids[:4] = torch.tensor([0, -1, HIGH, LOW])
    slots = [Slot("wide", 5, 0.5), Slot("narrow", 1)]
    storages = HostStorage(5, INITS), NaiveStorage(5, INITS)
    generator = torch.Generator().manual_seed(1)
    rows, wide, narrow = (torch.randn(30_000, width, generator=generator) for width in (5, 5, 1))
    state = {"wide": wide, "narrow": narrow, "step": torch.arange(30_000, dtype=torch.int32)[:, None]}
    for storage in storages:
        storage.set_slots(slots)
        storage.find_or_insert(tables[:100], ids[:100])  # rows that are overwritten
        storage.reserve(30_000)
        storage.write(tables, ids, rows, state)
    for table in range(3):
        (ours, handles), (theirs, naive_handles) = (storage.sorted_keys(table) for storage in storages)
        assert torch.equal(ours, theirs) and len(ours) > 9000
        assert torch.equal(storages[0].gather(handles), storages[1].gather(naive_handles))
        for name in state:
            assert torch.equal(storages[0].gather_slot(name, handles), storages[1].gather_slot(name, naive_handles))
    assert [len(part) for part in HostStorage(5, INITS).sorted_keys(1)] == [0, 0]
    with pytest.raises(ValueError, match="narrow"):
        storages[0].write(tables, ids, rows, state | {"narrow": wide})


def test_empty_calls() -> None:
    host = HostStorage(5, INITS)
    none, no_tables = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    assert host.find(no_tables, none).shape == (0,)
    assert host.find_or_insert(no_tables, none)[1] == 0 and host.erase(no_tables, none) == 0
    assert host.gather(none).shape == (0, 5) and host.gather(torch.tensor([-1, -1])).eq(0).all()
    host.set_slots([Slot("sum", 1)])
    host.update("rowwise_adagrad", none, torch.empty(0, 5), **HYPER["rowwise_adagrad"])
    assert [t.shape for t in host.keys()] == [(0,)] * 3 and len(host) == 0
    assert unique(none).ids.shape == (0,) and segment_sum(torch.empty(0, 5), none, 3).eq(0).all()
    assert segment_sum(torch.empty(0, 5), none, 0).shape == (0, 5) and take_rows(torch.ones(2, 5), none).shape == (0, 5)


def test_use_after_close_raises() -> None:
    host = HostStorage(5, INITS)
    before = library().grzoo_mapped_bytes()
    host.find_or_insert(*pairs(10))
    host.close()
    host.close()
    assert library().grzoo_mapped_bytes() == before
    for use in (lambda: len(host), host.keys, lambda: host.gather(torch.tensor([0])), lambda: host.find(*pairs(1))):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_bad_arguments_raise_and_change_nothing() -> None:
    host = HostStorage(4, INITS)
    handles, _ = host.find_or_insert(*pairs(10))
    table = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="ids must be a contiguous torch.int64"):
        host.find(table, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="tables must be"):
        host.find(torch.zeros(1, dtype=torch.int64), torch.tensor([1]))
    with pytest.raises(ValueError, match="table 3 at position 0 is not one of the 3"):
        host.find_or_insert(table + 3, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"handle 10 at position 1 is outside \[-1, 10\)"):
        host.gather(torch.tensor([0, 10]))
    with pytest.raises(ValueError, match=r"handle -1 at position 0 is outside \[0, 10\)"):
        host.gather_slot("step", torch.tensor([-1]))
    with pytest.raises(ValueError, match=r"segment 2 at position 0 is outside \[0, 2\)"):
        segment_sum(torch.ones(1, 4), torch.tensor([2]), 2)
    with pytest.raises(ValueError, match=r"row -1 at position 0 is outside \[0, 2\)"):
        take_rows(torch.ones(2, 4), torch.tensor([-1]))
    with pytest.raises(ValueError, match="grads must be a contiguous"):
        host.update("sgd", handles, torch.ones(4, 10).T, lr=1.0, momentum=0.0, weight_decay=0.0)
    with pytest.raises(TypeError, match="takes exactly"):
        host.update("sgd", handles, torch.ones(10, 4), lr=1.0)
    with pytest.raises(ValueError, match="must be positive"):
        HostStorage(0, INITS)
    assert len(host) == 10


def test_growth_beyond_the_limit_raises_and_leaves_the_table_as_it_was() -> None:
    host = HostStorage(64, INITS)
    tables, ids = pairs(1000)
    handles, _ = host.find_or_insert(tables, ids)
    rows = host.gather(handles)
    library().grzoo_set_memory_limit(library().grzoo_mapped_bytes() + (6 << 20))
    more_tables, more_ids = pairs(200_000, seed=1)
    with pytest.raises(MemoryError, match="evict rows"):
        host.find_or_insert(more_tables, more_ids)
    assert len(host) == 1000 and torch.equal(host.find(tables, ids), handles)
    assert torch.equal(host.gather(handles), rows)
    library().grzoo_set_memory_limit(0)
    assert host.find_or_insert(more_tables, more_ids)[1] == 200_000


def test_a_forked_child_makes_its_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRZOO_NUM_THREADS", "3")
    host = HostStorage(16, INITS)
    tables, ids = pairs(20_000)
    handles, _ = host.find_or_insert(tables, ids)
    expected = host.gather(handles)
    child = os.fork()
    if child == 0:  # in the child: no pytest machinery, only an exit status
        same = torch.equal(host.gather(host.find(tables, ids)), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- updates ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_updates_equal_the_naive_rules(name: str, dim: int, isa: str, threads: int) -> None:
    library().grzoo_set_isa(isa.encode())
    host, naive = HostStorage(dim, INITS), NaiveStorage(dim, INITS)
    generator = torch.Generator().manual_seed(1)
    tables, ids = pairs(3000)
    for storage in (host, naive):
        storage.set_slots(rule_slots(name, dim))
    for step in range(5):
        chosen = torch.randperm(3000, generator=generator)[: 0 if step == 3 else 2000]
        grads = torch.randn(len(chosen), dim, generator=generator)
        for storage in (host, naive):
            handles, _ = storage.find_or_insert(tables[chosen], ids[chosen])
            storage.update(name, handles, grads, **HYPER[name])
    a, b = host.find(tables, ids), naive.find(tables, ids)
    assert torch.equal(a < 0, b < 0)
    a, b = a[a >= 0], b[b >= 0]
    assert_close(host.gather(a), naive.gather(b))
    for slot in rule_slots(name, dim):
        assert_close(host.gather_slot(slot.name, a), naive.gather_slot(slot.name, b))
    assert torch.equal(host.gather_slot("step", a), naive.gather_slot("step", b))


@pytest.mark.parametrize(
    ("name", "change"),
    [("sgd", {"momentum": 0.0, "weight_decay": 0.0}), ("sgd", {"weight_decay": 0.0}), ("adam", {"weight_decay": 0.0}),
     ("adam", {"step": 100_000.0}), ("adamw", {"step": 7.0}), ("adam", {"beta1": 0.3, "beta2": 0.5})],
)  # fmt: skip
def test_hyperparameters_equal_the_naive_rules(name: str, change: dict[str, float]) -> None:
    host, naive = HostStorage(12, INITS), NaiveStorage(12, INITS)
    tables, ids = pairs(50)
    grads = torch.randn(3, 50, 12, generator=torch.Generator().manual_seed(1))
    rows = []
    for storage in (host, naive):
        storage.set_slots(rule_slots(name, 12))
        handles, _ = storage.find_or_insert(tables, ids)
        storage.scatter(handles, None, {"step": torch.arange(50, dtype=torch.int32)[:, None] * 1000})
        for grad in grads:
            storage.update(name, handles, grad, **{**HYPER[name], **change})
        rows.append(storage.gather(handles))
    assert_close(rows[0], rows[1])


@pytest.mark.parametrize("name", list(RULES))
def test_updates_have_the_same_bits_on_every_instruction_set(name: str) -> None:
    tables, ids = pairs(500)
    grads = torch.randn(500, 37, generator=torch.Generator().manual_seed(1))
    results = []
    for isa in ISAS:
        library().grzoo_set_isa(isa.encode())
        host = HostStorage(37, INITS)
        host.set_slots(rule_slots(name, 37))
        handles, _ = host.find_or_insert(tables, ids)
        host.update(name, handles, grads, **HYPER[name])
        host.update(name, handles, grads * 0.3, **HYPER[name])
        state = [host.gather_slot(slot.name, handles) for slot in rule_slots(name, 37)]
        results.append(torch.cat([host.gather(handles), *state], 1))
    assert all(torch.equal(results[0], result) for result in results)


# ---- functions ----


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_unique_equals_the_naive_one(data: st.DataObject, threads: int) -> None:
    n = data.draw(st.integers(0, 60))
    id_of = st.one_of(st.sampled_from([0, -1, 1, LOW, HIGH]), st.integers(LOW, HIGH))
    choices = data.draw(st.lists(id_of, min_size=1, max_size=20))
    ids = torch.tensor(data.draw(st.lists(st.sampled_from(choices), min_size=n, max_size=n)), dtype=torch.int64)
    tables = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), dtype=torch.int32)
    check_unique(ids, data.draw(st.sampled_from([None, tables])))


@pytest.mark.parametrize("distinct", [1, 100, 30_000, 10**9])
def test_unique_of_many(distinct: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(-distinct, distinct, (100_000,), generator=generator)
    tables = torch.randint(0, 3, (100_000,), generator=generator, dtype=torch.int32)
    check_unique(ids, None)
    check_unique(ids, tables)


def check_unique(ids: torch.Tensor, tables: torch.Tensor | None) -> None:
    host, naive = HOST.unique(ids, tables), NAIVE.unique(ids, tables)
    for name in ("ids", "inverse", "counts"):
        assert torch.equal(getattr(host, name), getattr(naive, name)), name
    assert (host.tables is None) == (naive.tables is None)
    assert naive.tables is None or torch.equal(host.tables, naive.tables)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("n", "dim", "segments"), [(1, 1, 1), (1000, 3, 10), (50_000, 16, 20_000), (30_000, 33, 7), (5, 64, 9000)]
)
def test_segment_sum_has_the_bits_of_the_naive_one(n: int, dim: int, segments: int, isa: str, threads: int) -> None:
    library().grzoo_set_isa(isa.encode())
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(n, dim, generator=generator)
    index = (torch.rand(n, generator=generator) ** 3 * segments).long()
    assert torch.equal(HOST.segment_sum(values, index, segments), NAIVE.segment_sum(values, index, segments))
    start = torch.randn(segments, dim, generator=generator)
    expected = NAIVE.segment_sum(values, index, segments, start.clone())
    out = start.clone()
    assert HOST.segment_sum(values, index, segments, out) is out and torch.equal(out, expected)


@pytest.mark.parametrize(("n", "dim"), [(0, 4), (1, 1), (1000, 3), (30_000, 64)])
def test_squared_norm_has_the_same_bits_for_any_threads_and_instruction_set(
    n: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(n, dim, generator=torch.Generator().manual_seed(4)) * 1e3
    norms = set()
    for isa in ISAS:
        library().grzoo_set_isa(isa.encode())
        for count in ("1", "2", "3"):
            monkeypatch.setenv("GRZOO_NUM_THREADS", count)
            norms.add(HOST.squared_norm(values))
    assert len(norms) == 1 and norms.pop() == pytest.approx(NAIVE.squared_norm(values), rel=1e-12)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [1, 16, 20, 64])
def test_take_rows_is_index_select(dim: int, isa: str, threads: int) -> None:
    library().grzoo_set_isa(isa.encode())
    values = torch.randn(1000, dim)
    index = torch.randint(0, 1000, (40_000,))
    assert torch.equal(take_rows(values, index), values[index])


# ---- any history ----


def split(keys: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([t for t, _ in keys], dtype=torch.int32), torch.tensor([i for _, i in keys], dtype=torch.int64)


class Twins(RuleBasedStateMachine):
    """Random operations on a C++ table, a naive one, and a Python dict of what must be there."""

    dim = 5

    @initialize(layout=st.sampled_from(list(RULES)), threads=st.sampled_from(["1", "2", "5"]))
    def start(self, layout: str, threads: str) -> None:
        os.environ["GRZOO_NUM_THREADS"] = threads
        self.rule_name = layout
        self.storages: list[TableStorage] = [HostStorage(self.dim, INITS), NaiveStorage(self.dim, INITS)]
        for storage in self.storages:
            storage.set_slots(rule_slots(layout, self.dim))
        self.alive: dict[tuple[int, int], int] = {}

    def draw(self, seed: int, n: int, distinct: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """n pairs among a few hundred, some of them extreme."""
        generator = random.Random(seed)
        extremes = [0, -1, 1, LOW, HIGH]
        keys = []
        for _ in range(n):
            id_ = generator.choice(extremes) if generator.random() < 0.05 else generator.randrange(300) << 45
            keys.append((generator.randrange(3), id_))
        if distinct:
            keys = list(dict.fromkeys(keys))
        return split(keys)

    batches = {"seed": st.integers(0, 2**31), "n": st.sampled_from([0, 1, 7, 40, 400])}

    @rule(**batches)
    def insert(self, seed: int, n: int) -> None:
        tables, ids = self.draw(seed, n, True)
        keys = list(zip(tables.tolist(), ids.tolist(), strict=True))
        new = sum(key not in self.alive for key in keys)
        results = [storage.find_or_insert(tables, ids) for storage in self.storages]
        assert [inserted for _, inserted in results] == [new, new]
        for key, handle in zip(keys, results[0][0].tolist(), strict=True):
            assert self.alive.setdefault(key, handle) == handle

    @rule(**batches)
    def find(self, seed: int, n: int) -> None:
        tables, ids = self.draw(seed, n, False)
        expected = [self.alive.get(key, -1) for key in zip(tables.tolist(), ids.tolist(), strict=True)]
        assert self.storages[0].find(tables, ids).tolist() == expected
        host, naive = (storage.gather(storage.find(tables, ids)) for storage in self.storages)
        assert_close(host, naive)

    @rule(**batches)
    def erase(self, seed: int, n: int) -> None:
        tables, ids = self.draw(seed, n, False)
        gone = {key for key in zip(tables.tolist(), ids.tolist(), strict=True) if key in self.alive}
        assert [storage.erase(tables, ids) for storage in self.storages] == [len(gone)] * 2
        for key in gone:
            del self.alive[key]

    @precondition(lambda self: self.alive)
    @rule(**batches)
    def update(self, seed: int, n: int) -> None:
        keys = random.Random(seed).sample(list(self.alive), min(n, len(self.alive)))
        tables, ids = split(keys)
        grads = torch.randn(len(keys), self.dim, generator=torch.Generator().manual_seed(seed))
        for storage in self.storages:
            storage.update(self.rule_name, storage.find(tables, ids), grads, **HYPER[self.rule_name])

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "storages"):
            return
        assert len(self.storages[0]) == len(self.storages[1]) == len(self.alive)
        found = {(t, i): h for t, i, h in zip(*(x.tolist() for x in self.storages[0].keys()), strict=True)}
        assert found == self.alive

    def teardown(self) -> None:
        for storage in getattr(self, "storages", []):
            tables, ids, handles = storage.keys()
            if storage is self.storages[0]:
                naive = self.storages[1]
                expected = naive.find(tables, ids)
                assert_close(storage.gather(handles), naive.gather(expected))
                for slot in rule_slots(self.rule_name, self.dim):
                    assert_close(storage.gather_slot(slot.name, handles), naive.gather_slot(slot.name, expected))
                assert torch.equal(storage.gather_slot("step", handles), naive.gather_slot("step", expected))
            storage.close()


def test_any_history_gives_the_table_of_the_naive_twin() -> None:
    run_state_machine_as_test(Twins, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))
