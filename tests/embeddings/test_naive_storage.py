"""The ground truth itself: the naive storage behaves as a Python dict of rows, its functions as their definitions."""

import random

import pytest
import torch
from grzoo.embeddings.kernels import BackendUnavailable, Slot, TableStorage, get_backend
from grzoo.embeddings.policies import initial_rows, row_init

NAIVE = get_backend("naive")
INITS = [
    row_init({"kind": "uniform", "scale": 1.0}, 0, "a"),
    row_init({"kind": "normal", "std": 1.0}, 0, "b"),
]
EXTREME = [0, -1, 1, 2**63 - 1, -(2**63), 1 << 52]


def pairs(*items: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    tables = torch.tensor([t for t, _ in items], dtype=torch.int32)
    return tables, torch.tensor([i for _, i in items], dtype=torch.int64)


def storage(dim: int = 3) -> TableStorage:
    return NAIVE.create(dim, INITS)


def test_it_is_a_table_storage() -> None:
    assert isinstance(storage(), TableStorage) and NAIVE.name == "naive"


def test_s2_s27_a_row_belongs_to_table_and_id_whatever_the_bits() -> None:
    table = storage()
    tables, ids = pairs(*[(t, i) for t in (0, 1) for i in EXTREME])
    handles, inserted = table.find_or_insert(tables, ids)
    assert inserted == len(table) == 2 * len(EXTREME) and len(handles.unique()) == inserted
    rows = table.gather(handles)
    for t in (0, 1):
        assert torch.equal(rows[tables == t], initial_rows(INITS[t], torch.tensor(EXTREME), 3))


def test_s19_handles_and_rows_survive_growth() -> None:
    table = storage()
    handles, _ = table.find_or_insert(*pairs(*[(0, i) for i in EXTREME]))
    before = table.gather(handles)
    table.find_or_insert(*pairs(*[(0, i) for i in range(100, 1100)]))
    assert torch.equal(table.find(*pairs(*[(0, i) for i in EXTREME])), handles)
    assert torch.equal(table.gather(handles), before)


def test_s4_find_changes_nothing_and_absent_rows_are_zero() -> None:
    table = storage()
    found = table.find(*pairs((0, 5), (1, 5), (0, 5)))
    assert found.tolist() == [-1, -1, -1] and len(table) == 0
    assert table.gather(found).tolist() == [[0.0] * 3] * 3
    handles, _ = table.find_or_insert(*pairs((1, 5)))
    out = torch.full((2, 3), float("nan"))
    assert table.gather(torch.tensor([-1, int(handles[0])]), out=out) is out
    assert out[0].tolist() == [0.0] * 3 and torch.equal(out[1], initial_rows(INITS[1], torch.tensor([5]), 3)[0])


def test_s13_an_erased_row_starts_afresh_in_whatever_place() -> None:
    table = storage()
    table.set_slots([Slot("sum", 1, 0.5), Slot("m", 3)])
    old = pairs((0, 1), (0, 2), (1, 1))
    handles, _ = table.find_or_insert(*old)
    table.update("rowwise_adagrad", handles, torch.ones(3, 3), lr=1.0, eps=1e-8)
    assert table.erase(*pairs((0, 1), (1, 1), (1, 7))) == 2 and len(table) == 1
    again, inserted = table.find_or_insert(*pairs((1, 9), (0, 1)))
    assert inserted == 2 and set(again.tolist()) == {int(handles[0]), int(handles[2])}  # places are used again
    assert torch.equal(table.gather(again[1:]), initial_rows(INITS[0], torch.tensor([1]), 3))
    assert table.gather_slot("sum", again).tolist() == [[0.5], [0.5]]
    assert (
        table.gather_slot("step", again).tolist() == [[0], [0]] and table.gather_slot("step", handles[1:2]).item() == 1
    )


def test_slots_keep_their_values_when_the_layout_changes() -> None:
    table = storage()
    handles, _ = table.find_or_insert(*pairs((0, 1)))
    table.set_slots([Slot("a", 1, 2.0), Slot("b", 3, 3.0)])
    assert table.gather_slot("a", handles).tolist() == [[2.0]] and table.gather_slot("b", handles).tolist() == [
        [3.0] * 3
    ]
    table.scatter(handles, None, {"a": torch.tensor([[9.0]])})
    table.set_slots([Slot("c", 1, 4.0), Slot("a", 1, 2.0)])
    assert table.gather_slot("a", handles).tolist() == [[9.0]] and table.gather_slot("c", handles).tolist() == [[4.0]]
    with pytest.raises(KeyError):
        table.gather_slot("b", handles)
    with pytest.raises(ValueError, match="width"):
        table.set_slots([Slot("a", 2)])


def test_random_operations_against_a_dict() -> None:
    chance, table = random.Random(0), storage(2)
    model: dict[tuple[int, int], list[float]] = {}
    for turn in range(300):
        chosen = list(
            {(chance.randrange(2), chance.choice(EXTREME + list(range(30)))) for _ in range(chance.randrange(8))}
        )
        tables, ids = pairs(*chosen)
        action = chance.choice(["insert", "erase", "write"])
        if action == "erase":
            assert table.erase(tables, ids) == sum(model.pop(pair, None) is not None for pair in chosen)
        else:
            handles, inserted = table.find_or_insert(tables, ids)
            assert inserted == sum(pair not in model for pair in chosen)
            for pair in chosen:
                model.setdefault(pair, initial_rows(INITS[pair[0]], torch.tensor([pair[1]]), 2)[0].tolist())
            if action == "write":
                table.scatter(handles, torch.full((len(ids), 2), float(turn)), {})
                model.update({pair: [float(turn)] * 2 for pair in chosen})
        all_tables, all_ids, handles = table.keys()
        rows = table.gather(handles).tolist()
        assert dict(zip(zip(all_tables.tolist(), all_ids.tolist(), strict=True), rows, strict=True)) == model
        assert len(table) == len(model)
    assert table.memory_bytes() > 0


def test_use_after_close_raises() -> None:
    table = storage()
    table.find_or_insert(*pairs((0, 1)))
    table.close()
    table.close()
    for use in (table.keys, table.memory_bytes, table.__len__, lambda: table.find(*pairs((0, 1)))):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    with pytest.raises(RuntimeError, match="closed"):
        table.gather(torch.tensor([0]))


@pytest.mark.parametrize("n", [0, 1, 500])
def test_unique_is_first_seen_order(n: int) -> None:
    chance = random.Random(n)
    ids = [chance.choice(EXTREME + list(range(40))) for _ in range(n)]
    tables = [chance.randrange(3) for _ in range(n)]
    plain, paired = (
        NAIVE.unique(torch.tensor(ids, dtype=torch.int64)),
        NAIVE.unique(torch.tensor(ids, dtype=torch.int64), torch.tensor(tables, dtype=torch.int32)),
    )
    assert plain.tables is None and plain.ids.tolist() == list(dict.fromkeys(ids))
    keys = list(dict.fromkeys(zip(tables, ids, strict=True)))
    assert paired.tables is not None and paired.tables.dtype == torch.int32
    assert list(zip(paired.tables.tolist(), paired.ids.tolist(), strict=True)) == keys
    assert [keys[i] for i in paired.inverse] == list(zip(tables, ids, strict=True))
    assert paired.counts.tolist() == [list(zip(tables, ids, strict=True)).count(k) for k in keys]
    assert plain.ids[plain.inverse].tolist() == ids and plain.counts.sum() == n


def test_segment_sum_adds_in_order_and_into_out() -> None:
    values = torch.tensor([[1e8], [1.0], [-1e8], [5.0]])
    index = torch.tensor([1, 1, 1, 2])
    assert NAIVE.segment_sum(values, index, 4).tolist() == [[0.0], [0.0], [5.0], [0.0]]  # float32: 1e8 + 1 - 1e8 = 0
    assert NAIVE.segment_sum(values[[0, 2, 1, 3]], index, 4).tolist() == [[0.0], [1.0], [5.0], [0.0]]
    out = torch.ones(3, 1)
    assert NAIVE.segment_sum(values[3:], index[3:], 3, out=out) is out and out.tolist() == [[1.0], [1.0], [6.0]]
    assert NAIVE.segment_sum(values[:0], index[:0], 2).tolist() == [[0.0], [0.0]]


def test_backends_are_chosen_by_name() -> None:
    assert get_backend("auto").name in ("host", "naive") and get_backend("naive") is NAIVE
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        get_backend("gpu")
    assert issubclass(BackendUnavailable, RuntimeError)
