"""Eviction, pins, erase and the log (S13, S16-S19) on one process; tests/distributed compares them over ranks."""

import copy
import gc

import pytest
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseAdam, TableConfig
from grzoo.embeddings import deletion as deletion_module
from grzoo.embeddings.eviction import how_many
from policy_table import build, train, use
from torch import Tensor

BACKENDS = ["naive", "host"]
LRU = {"eviction": {"kind": "lru", "every": 1}}
TTL = {"eviction": {"kind": "ttl", "steps": 1, "every": 1}}


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def kept(collection: DynamicEmbeddingCollection) -> list[int]:
    return sorted(collection.ids("a").tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_s13_s17_an_evicted_id_that_returns_starts_afresh(backend: str) -> None:
    collection, optimizer = build(backend, max_rows=2, admission={"min_count": 2}, **LRU)
    train(collection, optimizer, [1, 1, 1])
    train(collection, optimizer, [2, 2, 3, 3])
    assert kept(collection) == [2, 3]
    train(collection, optimizer, [1, 2, 3])
    assert kept(collection) == [2, 3], "its counter went with it: it is counted anew"
    train(collection, optimizer, [1, 1])
    rows = collection.export_rows("a")
    one = rows["ids"].tolist().index(1)
    assert rows["step"][one] == 1 and rows["count"][one] == 2 and rows["last_use"][one] == 4
    fresh, other = build(backend)
    train(fresh, other, [1, 1])
    for name, value in fresh.export_rows("a").items():
        assert torch.equal(rows[name][one], value[0]), name


def test_s16_rows_of_steps_in_flight_stay() -> None:
    collection, optimizer = build(**TTL)
    train(collection, optimizer, [1, 2, 3, 4])
    prepared = collection.prepare([{"f": ids(1)}])
    fetched = collection.prepare([{"f": ids(2)}]).fetch()
    held = collection.prepare([{"f": ids(4)}], insert=False, count=False)
    train(collection, optimizer, [9])
    assert kept(collection) == [1, 2, 9], "3 and 4 have expired; a lookup that does not insert holds nothing"
    assert not held.fetch()[0]["f"].any(), "a row that went is unknown to older steps"
    fetched[0]["f"].sum().backward()
    train(collection, optimizer, [9])
    prepared.fetch()
    del prepared, fetched
    gc.collect()
    train(collection, optimizer, [9])
    train(collection, optimizer, [9])
    assert kept(collection) == [9]


def test_s16_a_step_with_pending_gradients_survives_the_eviction_of_others() -> None:
    collection, optimizer = build(max_rows=3, **LRU)
    train(collection, optimizer, [1, 2])
    pending = collection.prepare([{"f": ids(1)}]).fetch()
    pending[0]["f"].sum().backward()
    for new in (3, 4, 5):
        train(collection, optimizer, [new])
    assert len(kept(collection)) == 3 and collection.clock == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_s16_rows_that_the_step_trained_stay_though_another_step_came_after_their_prepare(backend: str) -> None:
    collection, optimizer = build(backend, max_rows=2, eviction={"kind": "lru", "every": 2})
    first = collection.prepare([{"f": ids(5, 6)}]).fetch()
    ahead = collection.prepare([{"f": ids(1, 1)}])
    for step in (first, ahead):
        if step is ahead:
            step.fetch()
        step[0]["f"].sum().backward()
        optimizer.step()
    assert use(collection) == {1: (2, 2), 6: (1, 1)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_s16_rows_that_the_step_trained_stay_though_they_were_not_counted(backend: str) -> None:
    collection, optimizer = build(backend, max_rows=2, eviction={"kind": "lfu", "every": 1, "half_life": 2})
    train(collection, optimizer, [1, 1, 1, 1, 2])
    for step in (collection.prepare([{"f": ids(3)}]), collection.prepare([{"f": ids(1)}], count=False)):
        step.fetch()[0]["f"].sum().backward()
    optimizer.step()
    assert use(collection) == {1: (2, 2), 3: (2, 1)}, "a count is as of the last use: halved at step 2"


@pytest.mark.parametrize("backend", BACKENDS)
def test_s16_erasing_rows_with_pending_gradients_is_safe(backend: str) -> None:
    collection, optimizer = build(backend)
    train(collection, optimizer, [1, 2])
    before = collection.export_rows("a")
    step = collection.prepare([{"f": ids(1, 2)}]).fetch()
    step[0]["f"].sum().backward()
    assert collection.erase("a", ids(1)) == (1, 0)
    collection.prepare([{"f": ids(8)}])  # takes the freed row
    optimizer.reduce()
    assert collection.erase("a", ids(2)) == (1, 0)
    collection.prepare([{"f": ids(7)}])
    optimizer.step()
    rows = collection.export_rows("a")
    assert sorted(rows["ids"].tolist()) == [7, 8]
    assert rows["rows"].eq(1).all() and not rows["step"].any() and not rows["exp_avg"].any()
    step[0]["f"].sum().backward()  # a second backward of an old step
    optimizer.step()
    assert torch.equal(collection.export_rows("a")["rows"], rows["rows"]) and before["step"].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_s15_s16_erasing_rows_of_bfloat16_with_reduced_gradients_is_safe(backend: str) -> None:
    table = TableConfig(name="a", embedding_dim=4, row_dtype="bfloat16")
    collection = DynamicEmbeddingCollection([table], [FeatureConfig(name="f", table="a")], backend=backend)
    optimizer = SparseAdam(collection, lr=0.1)
    collection({"f": ids(1, 2, 3)})["f"].sum().backward()
    optimizer.reduce()
    assert collection.erase("a", ids(2)) == (1, 0)
    optimizer.step()
    assert kept(collection) == [1, 3] and collection.export_rows("a")["step"].eq(1).all()


def test_erase_counts_ignores_and_reports_unknown_ids() -> None:
    collection, optimizer = build(admission={"min_count": 2})
    train(collection, optimizer, [1, 1, 2])
    erased = collection.erase("a", ids(1, 1, 2, 77))
    assert erased.rows == 1 and erased.unknown == 2
    train(collection, optimizer, [2])
    assert kept(collection) == [], "the admission counter of 2 was erased too"
    for bad in (torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32), [1]):
        with pytest.raises(ValueError, match="must be an int64 tensor"):
            collection.erase("a", bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no table 'b'"):
        collection.erase("b", ids(1))


def test_pinned_ids_stay_until_they_are_unpinned_or_erased() -> None:
    collection, optimizer = build(**TTL)
    collection.pin("a", ids(1, 2, 3))
    for step in ([1, 2, 4], [5], [3], [5]):
        train(collection, optimizer, step)
    assert kept(collection) == [1, 2, 3, 5], "3 was pinned before it had a row"
    collection.unpin("a", ids(1, 99))
    collection.erase("a", ids(2))
    train(collection, optimizer, [5])
    assert kept(collection) == [3, 5]


def test_pinning_what_is_never_evicted_warns() -> None:
    collection, _ = build()
    with pytest.warns(UserWarning, match="no effect on table 'a'"):
        collection.pin("a", ids(1))


def test_s19_a_table_full_of_rows_in_use_raises_and_says_why() -> None:
    collection, optimizer = build(max_rows=2, **LRU)
    with pytest.raises(ValueError, match="'a' has 3 rows and max_rows is 2.*Raise max_rows"):
        train(collection, optimizer, [1, 2, 3])
    assert collection.clock == 1 and kept(collection) == [1, 2, 3], "the step itself was applied"
    train(collection, optimizer, [1])
    assert kept(collection) == [1, 3], "of equal scores the smaller id goes"


def test_s17_the_log_holds_what_was_deleted_and_is_drained_once() -> None:
    collection, optimizer = build(**TTL)
    train(collection, optimizer, [1, 2])
    train(collection, optimizer, [3])
    collection.erase("a", ids(3))
    train(collection, optimizer, [1])
    train(collection, optimizer, [4])
    log = collection.drain_evicted("a")
    assert dict(zip(log.ids.tolist(), log.steps.tolist(), strict=True)) == {1: 4, 2: 2, 3: 2} and log.dropped == 0
    assert len(collection.drain_evicted("a").ids) == 0


def test_the_log_is_bounded_and_says_what_it_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion_module, "LOG_ROWS", 8)
    collection, optimizer = build(**TTL)
    for step in range(20):
        train(collection, optimizer, [step])
    log = collection.drain_evicted("a")
    assert len(log.ids) <= 8 and len(log.ids) + log.dropped == 19
    assert sorted(log.steps.tolist()) == list(range(21 - len(log.ids), 21)), "the oldest went"
    assert collection.drain_evicted("a").dropped == 0


def test_s28_a_copy_keeps_clock_use_counters_pins_and_log() -> None:
    collection, optimizer = build(admission={"min_count": 2}, **TTL)
    collection.pin("a", ids(1))
    for step in ([1, 1, 2, 2, 5], [3, 3]):
        train(collection, optimizer, step)
    twin = copy.deepcopy(collection)
    other = SparseAdam(twin, lr=0.1)
    for tables, sparse in ((collection, optimizer), (twin, other)):
        for step in ([4, 4], [5]):
            train(tables, sparse, step)
    assert use(twin) == use(collection) and twin.clock == 4 and kept(twin) == [1, 5]
    a, b = twin.drain_evicted("a"), collection.drain_evicted("a")
    assert a.ids.tolist() == b.ids.tolist() != []


@pytest.mark.parametrize(
    ("policy", "max_rows", "sizes", "count"),
    [
        ({}, None, (10, 10, 0), 0),
        ({}, 6, (10, 10, 0), 4),
        ({}, 6, (10, 3, 0), 3),
        ({"max_evictions": 2}, 6, (10, 10, 0), 2),
        ({"min_rows": 8}, None, (10, 9, 9), 2),
        ({"min_rows": 12}, None, (10, 9, 9), 0),
        ({}, 6, (10, 9, 7), 7),
        ({}, 20, (10, 9, 7), 7),
    ],
)
def test_s17_floor_ceiling_and_limit(
    policy: dict[str, int], max_rows: int | None, sizes: tuple[int, int, int], count: int
) -> None:
    assert how_many({"max_evictions": None} | policy, max_rows, *sizes) == count


def test_a_step_without_gradients_is_no_step() -> None:
    collection, optimizer = build(**TTL)
    train(collection, optimizer, [1])
    for _ in range(3):
        optimizer.step()
    assert collection.clock == 1 and kept(collection) == [1]


def test_statistics_are_of_the_steps_since_the_last_call() -> None:
    tables = [
        TableConfig(name="a", embedding_dim=3, max_rows=3, **LRU),  # type: ignore[arg-type]
        TableConfig(name="b", embedding_dim=3),
        TableConfig(name="c", embedding_dim=3),
    ]
    collection = DynamicEmbeddingCollection(tables, [FeatureConfig(name=t.name, table=t.name) for t in tables])
    optimizer = SparseAdam(collection)

    def step(**features: Tensor) -> None:
        found = collection(features)
        sum((rows.sum() for rows in found.values()), torch.zeros(())).backward()
        optimizer.step()

    step(a=ids(1, 2, 2, 2), b=ids(1, 1), c=ids(9))
    step(a=ids(3, 4), b=ids(1, 2))
    found = collection.statistics()
    assert {name: found["a"][name] for name in ("rows", "growth", "new_rows", "evicted", "erased")} == {
        "rows": 3, "growth": 3, "new_rows": 4, "evicted": 1, "erased": 0,
    }  # fmt: skip
    assert found["a"]["dedup_ratio"] == 6 / 4 and found["a"]["new_row_rate"] == 1.0
    assert found["b"]["rows"] == 2 and found["b"]["new_row_rate"] == 2 / 3 and found["c"]["rows_by_rank"] == [1]
    collection.eval()
    with torch.no_grad():
        collection({"b": ids(1, 5, 6), "c": ids(9)})
    later = collection.statistics()
    assert later["b"]["unknown_rate"] == 2 / 3 and later["c"]["unknown_rate"] == 0.0
    assert later["a"]["growth"] == later["b"]["new_rows"] == 0 and later["b"]["load_imbalance"] == 1.0


def test_use_after_close_raises() -> None:
    collection, optimizer = build(**TTL)
    train(collection, optimizer, [1])
    collection.close()
    for action in (lambda: collection.erase("a", ids(1)), lambda: collection.statistics()):
        with pytest.raises(RuntimeError, match="closed"):
            action()  # type: ignore[no-untyped-call]
