"""Tables against a Python dict, over random histories: look up, train, erase, evict, pin, grow, save and load."""

import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from typing import Any

import pytest
import torch
from grzoo.embeddings import (
    DynamicEmbeddingCollection,
    FeatureConfig,
    SparseSGD,
    TableConfig,
)
from grzoo.embeddings.io import load_tables, save_tables
from hypothesis import HealthCheck, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

DIM, INITIAL, LEARNING_RATE, MAX_ROWS, EVERY = 3, 0.5, 0.25, 6, 2
EDGES = [0, -1, 2**63 - 1, -(2**63), 2**32, -(2**32)]
IDS = st.one_of(st.integers(0, 12), st.sampled_from(EDGES))
BATCH = st.lists(IDS, max_size=8)
TABLES = ("plain", "bounded")


class TablesAgainstADict(RuleBasedStateMachine):
    """Values are halves and quarters: sums and updates are exact, so rows are compared bit for bit."""

    backend = "naive"
    placement = "host"
    steps_done = 0  # rules of all histories; counted by the class

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, dict[int, float]] = {table: {} for table in TABLES}
        self.steps: dict[str, dict[int, int]] = {table: {} for table in TABLES}
        self.last_use: dict[int, int] = {}  # of "bounded"
        self.pinned: set[int] = set()
        self.clock = 0

    @initialize(merge=st.booleans())
    def make(self, merge: bool) -> None:
        self.merge = merge
        self.tables, self.optimizer = self.build()
        type(self).steps_done -= 1  # this is no step, but the invariant is looked at after it

    def build(self) -> tuple[DynamicEmbeddingCollection, SparseSGD]:
        initializer = {"kind": "constant", "value": INITIAL}
        common: dict[str, Any] = {"embedding_dim": DIM, "initializer": initializer, "placement": self.placement}
        evicting: dict[str, Any] = {"max_rows": MAX_ROWS, "eviction": {"kind": "lru", "every": EVERY}}
        configs = [TableConfig(name="plain", **common), TableConfig(name="bounded", **common, **evicting)]
        features = [FeatureConfig(name=table, table=table) for table in TABLES]
        collection = DynamicEmbeddingCollection(configs, features, backend=self.backend, merge=self.merge)
        return collection, SparseSGD(collection, lr=LEARNING_RATE)

    @rule(micro_batches=st.lists(st.fixed_dictionaries({table: BATCH for table in TABLES}), min_size=1, max_size=3))
    def train(self, micro_batches: list[dict[str, list[int]]]) -> None:
        """One optimizer step; the gradient of an occurrence in micro-batch k is k + 1."""
        used = {table: {i for batch in micro_batches for i in batch[table]} for table in TABLES}
        if len(self.protected(used["bounded"])) > MAX_ROWS:
            return  # eviction could not go below max_rows and would raise: tested by itself
        prepared = self.tables.prepare(
            [{t: torch.tensor(b[t], dtype=torch.int64) for t in TABLES} for b in micro_batches]
        )
        step = prepared.fetch()
        for number, batch in enumerate(micro_batches):
            for table in TABLES:
                expected = [self.rows[table].get(i, INITIAL) for i in batch[table]]
                rows = step[number][table]
                assert rows.detach().tolist() == [[value] * DIM for value in expected]
                (rows * (number + 1)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock += 1
        for table in TABLES:
            for i in used[table]:
                gradient = sum((k + 1) * batch[table].count(i) for k, batch in enumerate(micro_batches))
                self.rows[table][i] = self.rows[table].get(i, INITIAL) - LEARNING_RATE * gradient
                self.steps[table][i] = self.steps[table].get(i, 0) + 1
        self.last_use |= dict.fromkeys(used["bounded"], self.clock)
        if self.clock % EVERY == 0:
            self.evict(used["bounded"])

    def protected(self, used: set[int]) -> set[int]:
        return used | (self.pinned & (set(self.rows["bounded"]) | used))

    def evict(self, used: set[int]) -> None:
        may_go = sorted(set(self.rows["bounded"]) - self.protected(used), key=lambda i: (self.last_use[i], i))
        for i in may_go[: max(0, len(self.rows["bounded"]) - MAX_ROWS)]:
            self.forget("bounded", i)

    def forget(self, table: str, i: int) -> None:
        del self.rows[table][i], self.steps[table][i]
        if table == "bounded":
            del self.last_use[i]

    @rule(table=st.sampled_from(TABLES), ids=BATCH)
    def look_up(self, table: str, ids: list[int]) -> None:
        """Reading changes nothing; an id without a row is zeros."""
        self.tables.eval()
        with torch.no_grad():
            rows = self.tables({table: torch.tensor(ids, dtype=torch.int64)})[table]
        self.tables.train()
        assert rows.tolist() == [[self.rows[table].get(i, 0.0)] * DIM for i in ids]

    @rule(table=st.sampled_from(TABLES), ids=st.lists(IDS, max_size=5))
    def erase(self, table: str, ids: list[int]) -> None:
        erased = self.tables.erase(table, torch.tensor(ids, dtype=torch.int64))
        known = set(ids) & set(self.rows[table])
        assert tuple(erased) == (len(known), len(set(ids) - known))
        for i in known:
            self.forget(table, i)

    @rule(i=IDS)
    @precondition(lambda self: len(self.pinned) < 3)
    def pin(self, i: int) -> None:
        self.tables.pin("bounded", torch.tensor([i]))
        self.pinned.add(i)

    @rule(i=IDS)
    def unpin(self, i: int) -> None:
        self.tables.unpin("bounded", torch.tensor([i]))
        self.pinned.discard(i)

    @rule(first=st.integers(-(2**40), 2**40), count=st.integers(1, 300))
    def grow(self, first: int, count: int) -> None:
        """Many new rows at once: the index grows, nothing else moves."""
        ids = torch.arange(first, first + count)
        self.tables.import_rows("plain", {"ids": ids, "rows": torch.full((count, DIM), 2.0)})
        for i in ids.tolist():
            self.rows["plain"][i], self.steps["plain"][i] = 2.0, 0

    @rule()
    def save_and_load(self) -> None:
        """Into a collection made anew, which goes on from there."""
        with tempfile.TemporaryDirectory() as folder:
            save_tables(self.tables, folder, state=True)
            tables, optimizer = self.build()
            load_tables(tables, folder)
        self.tables.close()
        self.tables, self.optimizer = tables, optimizer

    def teardown(self) -> None:
        if hasattr(self, "tables"):
            self.tables.close()

    @invariant()
    def rows_are_those_of_the_dict(self) -> None:
        if not hasattr(self, "tables"):
            return
        type(self).steps_done += 1
        for table in TABLES:
            found = self.tables.export_rows(table)
            ids = found["ids"].tolist()
            assert sorted(ids) == sorted(self.rows[table]) and len(ids) == self.tables.num_rows(table)
            assert found["rows"].tolist() == [[self.rows[table][i]] * DIM for i in ids]
            assert found["step"].tolist() == [self.steps[table][i] for i in ids]
        bounded = self.tables.export_rows("bounded")
        assert dict(zip(bounded["ids"].tolist(), bounded["last_use"].tolist(), strict=True)) == self.last_use
        assert self.tables.clock == self.clock


def run(at_least: int, *, backend: str = "naive", placement: str = "host", steps: int = 50) -> None:
    """Let hypothesis write histories until so many steps of them were done."""
    machine = type(f"On{backend.title()}", (TablesAgainstADict,), {"backend": backend, "placement": placement})
    for number in itertools.count():
        if machine.steps_done >= at_least:
            break
        limits = settings(
            max_examples=min(100, 1 + (at_least - machine.steps_done) // 40),
            stateful_step_count=steps,
            deadline=None,
            database=None,
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(seed(number)(machine), settings=limits)
    print(f"{backend} tables in {placement} memory were a dict for {machine.steps_done} steps")


@pytest.mark.parametrize("backend", ["naive", "host"])
def test_tables_are_a_dict(backend: str) -> None:
    run(200, backend=backend)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["naive", "host"])
def test_tables_are_a_dict_for_ten_thousand_steps(backend: str) -> None:
    run(10_000, backend=backend)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_device_tables_are_a_dict() -> None:
    """300 steps under Triton's interpreter (or on a GPU), in a process of its own."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env={**os.environ, **interpret}, capture_output=True, text=True)
    print(done.stdout[-200:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


if __name__ == "__main__":
    run(300, placement="device", steps=20)
