"""Admission by count (S8), and what a lookup notes of the use of rows (S4, S6)."""

import pytest
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, TableConfig
from policy_table import build, candidates, train, use

BACKENDS = ["naive", "host"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_s8_an_id_gets_its_row_at_the_occurrence_that_admits_it(backend: str) -> None:
    collection, optimizer = build(backend, admission={"min_count": 3})
    first = train(collection, optimizer, [7, 7, 8], [9, 9, 9])
    assert first.tolist() == [[0.0] * 3] * 3, "not admitted: the default"
    assert collection.ids("a").tolist() == [9], "three occurrences in two micro-batches of one step"
    assert candidates(collection) == {7: 2, 8: 1}
    train(collection, optimizer, [7, 8])
    assert sorted(collection.ids("a").tolist()) == [7, 9]
    assert candidates(collection) == {8: 2}, "the counter of an admitted id is dropped"
    steps = collection.export_rows("a")
    assert dict(zip(steps["ids"].tolist(), steps["step"].tolist(), strict=True)) == {7: 1, 9: 1}


def test_s8_an_id_that_waits_gets_no_gradient_and_no_state() -> None:
    collection, optimizer = build(admission={"min_count": 2})
    train(collection, optimizer, [4])
    train(collection, optimizer, [4])
    rows = collection.export_rows("a")
    fresh, other = build()
    train(fresh, other, [4])
    for name, value in fresh.export_rows("a").items():
        assert torch.equal(rows[name], value), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_s8_a_threshold_of_one_is_no_filter(backend: str) -> None:
    with pytest.warns(UserWarning, match="no effect"):
        filtered, optimizer = build(backend, admission={"min_count": 1})
    plain, other = build(backend)
    for ids in ([1, 2, 2], [2, 5]):
        train(filtered, optimizer, ids)
        train(plain, other, ids)
    for name, value in plain.export_rows("a").items():
        assert torch.equal(filtered.export_rows("a")[name], value)
    assert candidates(filtered) == {}


def test_s8_a_second_lookup_of_a_step_does_not_count_twice() -> None:
    collection, optimizer = build(admission={"min_count": 2}, track_use=True)
    ids = {"f": torch.tensor([5, 6, 6])}
    collection.prepare([ids])
    assert candidates(collection) == {5: 1} and use(collection) == {6: (1, 2)}
    for _ in range(3):
        collection.prepare([ids], count=False)
    assert candidates(collection) == {5: 1} and use(collection) == {6: (1, 2)}
    collection.prepare([ids], insert=False, count=True)
    assert candidates(collection) == {5: 2} and use(collection) == {6: (1, 4)}
    collection.prepare([ids], count=False)
    assert candidates(collection) == {} and use(collection) == {5: (1, 0), 6: (1, 4)}


def test_s4_evaluation_changes_nothing() -> None:
    collection, optimizer = build(admission={"min_count": 2}, eviction={"kind": "ttl", "steps": 1, "every": 1})
    train(collection, optimizer, [1, 1, 2])
    before = use(collection), candidates(collection), collection.clock, collection.memory_bytes()
    collection.eval()
    with torch.no_grad():
        for _ in range(3):
            collection({"f": torch.tensor([1, 2, 3, 3])})
    assert before == (use(collection), candidates(collection), collection.clock, collection.memory_bytes())


@pytest.mark.parametrize("backend", BACKENDS)
def test_s6_counts_are_of_occurrences_and_the_step_is_noted_once(backend: str) -> None:
    collection, optimizer = build(backend, track_use=True)
    train(collection, optimizer, [1, 1, 2], [1, 3])
    train(collection, optimizer, [3], [3, 4])
    assert use(collection) == {1: (1, 3), 2: (1, 1), 3: (2, 3), 4: (2, 1)}


def test_counters_of_ids_that_do_not_return_are_dropped() -> None:
    collection, optimizer = build(admission={"min_count": 3, "forget_after": 4})
    train(collection, optimizer, [1, 2])
    train(collection, optimizer, [2])
    train(collection, optimizer, [3, 9, 9, 9])
    assert candidates(collection) == {1: 1, 2: 2, 3: 1}
    for _ in range(4):
        train(collection, optimizer, [9])
    assert candidates(collection) == {1: 1, 2: 2, 3: 1}, "step 4 drops ids not met since step 0"
    train(collection, optimizer, [9])
    assert candidates(collection) == {}, "step 8 drops ids not met since step 4"


def test_a_table_without_policies_keeps_nothing_more() -> None:
    collection, optimizer = build()
    train(collection, optimizer, [1, 2])
    assert set(collection.export_rows("a")) == {"ids", "rows", "step", "exp_avg", "exp_avg_sq"}
    assert collection.physical[0].side == {}


def test_s27_tables_with_and_without_use_data_merge_apart() -> None:
    names = {"a": {}, "b": {"track_use": True}, "c": {}, "d": {"admission": {"min_count": 2}}, "e": {"track_use": True}}
    configs = [TableConfig(name=name, embedding_dim=3, **policy) for name, policy in names.items()]  # type: ignore[arg-type]
    collection = DynamicEmbeddingCollection(configs, [])
    assert [[c.name for c in p.configs] for p in collection.physical] == [["a", "c"], ["b", "e"], ["d"]]


def test_s19_a_table_that_does_not_evict_refuses_to_exceed_max_rows() -> None:
    collection, optimizer = build(max_rows=3)
    train(collection, optimizer, [1, 2, 3])
    with pytest.raises(ValueError, match="'a' has 3 rows and needs 1 more, max_rows is 3.*raise max_rows"):
        collection.prepare([{"f": torch.tensor([1, 4])}])
    assert collection.num_rows() == 3
    train(collection, optimizer, [1, 2, 3])
    with torch.no_grad():
        collection.eval()({"f": torch.tensor([4])})
    collection.train().erase("a", torch.tensor([1]))
    train(collection, optimizer, [4])
    assert sorted(collection.ids("a").tolist()) == [2, 3, 4]


def test_s19_what_would_exceed_max_rows_changes_no_table() -> None:
    tables = [TableConfig(name="limited", embedding_dim=2, max_rows=1), TableConfig(name="free", embedding_dim=2)]
    collection = DynamicEmbeddingCollection(tables, [FeatureConfig(name=t.name, table=t.name) for t in tables])
    for order in (["free", "limited"], ["limited", "free"]):
        with pytest.raises(ValueError, match="'limited' has 0 rows and needs 2 more"):
            collection.prepare([{name: torch.tensor([1, 2]) for name in order}])
    assert collection.num_rows() == 0


def test_merged_tables_with_a_ceiling_count_their_rows_without_reading_them_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = [TableConfig(name=name, embedding_dim=2, max_rows=9) for name in "ab"]
    features = [FeatureConfig(name=t.name, table=t.name) for t in tables]
    collection = DynamicEmbeddingCollection(tables, features, backend="naive")
    collection.prepare([{"a": torch.tensor([1, 2]), "b": torch.tensor([2])}])
    with monkeypatch.context() as patched:
        patched.delattr(type(collection.physical[0].storage), "keys")
        collection.prepare([{"a": torch.tensor([2, 3]), "b": torch.tensor([5, 6, 7, 2])}])
        assert [collection.num_rows(name) for name in "ab"] == [3, 4]
    assert [len(collection.ids(name)) for name in "ab"] == [3, 4]
    collection.erase("b", torch.tensor([5, 6]))
    assert [collection.num_rows(name) for name in "ab"] == [3, 2]
