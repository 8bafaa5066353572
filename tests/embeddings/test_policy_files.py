"""S18, S20, S21, S23: what policies remember is in checkpoints; tests/distributed saves and loads on other ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grzoo.embeddings import deletion as deletion_module
from grzoo.embeddings.io import load_tables, read_index, save_tables
from policy_table import build, candidates, train, use
from safetensors import safe_open

TTL = {"eviction": {"kind": "ttl", "steps": 2, "every": 1}}
LFU = {"eviction": {"kind": "lfu", "every": 2, "half_life": 3}, "max_rows": 10}


def stream(step: int) -> list[int]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(step, step + 9, (12,), generator=generator).tolist()


@pytest.mark.parametrize("backend", ["naive", "host"])
@pytest.mark.parametrize("policies", [TTL, LFU], ids=["ttl", "lfu"])
def test_s18_s23_a_resumed_run_evicts_as_if_it_had_never_stopped(
    tmp_path: Path, policies: dict[str, Any], backend: str
) -> None:
    policies = policies | {"admission": {"min_count": 3, "forget_after": 7}}
    whole, optimizer = build(backend, **policies)
    whole.pin("a", torch.tensor([3, 4]))
    for step in range(5):
        train(whole, optimizer, stream(step))
    save_tables(whole, tmp_path, state=True)
    resumed, other = build(backend, **policies)
    load_tables(resumed, tmp_path, state=True)
    assert resumed.clock == 5 and use(resumed) == use(whole) and candidates(resumed) == candidates(whole) != {}
    for step in range(5, 11):
        train(whole, optimizer, stream(step))
        train(resumed, other, stream(step))
    assert use(resumed) == use(whole) and candidates(resumed) == candidates(whole)
    for name, value in whole.export_rows("a").items():
        assert torch.equal(resumed.export_rows("a")[name], value), name
    logs = [tables.drain_evicted("a") for tables in (whole, resumed)]
    assert logs[0].ids.tolist() == logs[1].ids.tolist() != [] and torch.equal(logs[0].steps, logs[1].steps)


def test_use_is_stored_as_integers_beside_the_rows(tmp_path: Path) -> None:
    collection, optimizer = build(admission={"min_count": 2}, **TTL)
    train(collection, optimizer, [1, 1, 2])
    save_tables(collection, tmp_path, state=True)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("a.last_use").tolist() == [1] and file.get_tensor("a.count").tolist() == [2]
        assert file.get_tensor("a.count").dtype == torch.int32
        assert file.get_tensor("a/candidates.ids").tolist() == [2]
        assert not any(name.startswith(("a/evicted", "a/pinned")) for name in file.keys())  # noqa: SIM118
    policies = read_index(tmp_path)["metadata"]["policies"]
    assert policies == {"clock": 1, "side_rows": {"a/candidates": 1}, "dropped": {}}


def test_policies_may_change_between_save_and_load(tmp_path: Path) -> None:
    plain, optimizer = build()
    for ids in ([1], [2]):
        train(plain, optimizer, ids)
    save_tables(plain, tmp_path / "plain", state=True)
    evicting, other = build(**TTL)
    load_tables(evicting, tmp_path / "plain")
    assert use(evicting) == {1: (2, 0), 2: (2, 0)}, "rows of unknown use count as used just now"
    train(evicting, other, [3])
    evicting.erase("a", torch.tensor([1]))
    save_tables(evicting, tmp_path / "evicting", state=True)
    load_tables(plain, tmp_path / "evicting")
    assert sorted(plain.ids("a").tolist()) == [2, 3] and plain.drain_evicted("a").ids.tolist() == [1]


def test_an_export_without_state_says_nothing_of_use(tmp_path: Path) -> None:
    collection, optimizer = build(admission={"min_count": 2}, **TTL)
    train(collection, optimizer, [1, 1, 2])
    save_tables(collection, tmp_path, state=False)
    assert read_index(tmp_path)["metadata"]["policies"] is None
    fresh, _ = build(admission={"min_count": 2}, **TTL)
    load_tables(fresh, tmp_path)
    assert fresh.clock == 0 and use(fresh) == {1: (0, 0)} and candidates(fresh) == {}


def test_the_log_remembers_what_it_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion_module, "LOG_ROWS", 4)
    collection, optimizer = build(**TTL)
    for step in range(12):
        train(collection, optimizer, [step])
    save_tables(collection, tmp_path, state=True)
    fresh, _ = build(**TTL)
    load_tables(fresh, tmp_path, state=True)
    found, expected = fresh.drain_evicted("a"), collection.drain_evicted("a")
    assert found.ids.tolist() == expected.ids.tolist() and found.dropped == expected.dropped > 0


def test_s20_a_side_table_that_lacks_entries_is_refused(tmp_path: Path) -> None:
    collection, optimizer = build(admission={"min_count": 2})
    train(collection, optimizer, [1, 1, 2])
    save_tables(collection, tmp_path, state=True)
    path = tmp_path / "embeddings.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["policies"]["side_rows"]["a/candidates"] = 2
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="'a/candidates'.*should have 2 entries, its shards hold 1"):
        load_tables(collection, tmp_path)
