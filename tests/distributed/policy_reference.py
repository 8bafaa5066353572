"""Admission and eviction of one table in plain Python, row by row: what README.md of the tables promises."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from grzoo.embeddings import TableConfig


@dataclass
class Use:
    last_use: int
    count: int


@dataclass
class ReferenceTable:
    config: TableConfig
    clock: int = 0
    rows: dict[int, Use] = field(default_factory=dict)
    candidates: dict[int, Use] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    evicted: dict[int, int] = field(default_factory=dict)  # id -> step

    def step(self, ids: Iterable[int]) -> None:
        """One optimizer step on all occurrences of its ids, on all ranks."""
        self.clock += 1
        half_life = (self.config.eviction or {}).get("half_life")
        if half_life and self.clock % half_life == 0:
            for use in self.rows.values():
                use.count //= 2
        for i, n in Counter(ids).items():
            self._look_up(i, n)
        self._forget()
        self._evict()

    def _look_up(self, i: int, n: int) -> None:
        if i not in self.rows:
            waiting = self.candidates.setdefault(i, Use(0, 0))
            waiting.count += n
            waiting.last_use = self.clock
            if waiting.count < self.config.min_count:
                return
            del self.candidates[i]
            self.rows[i] = Use(0, 0)
        self.rows[i].last_use = self.clock
        self.rows[i].count += n

    def _forget(self) -> None:
        steps = (self.config.admission or {}).get("forget_after")
        if steps and self.clock % steps == 0:
            self.candidates = {i: u for i, u in self.candidates.items() if self.clock - u.last_use < steps}

    def _evict(self) -> None:
        policy = self.config.eviction
        if policy is None or self.clock % policy["every"]:
            return
        free = {i: u for i, u in self.rows.items() if u.last_use < self.clock and i not in self.pinned}
        order = sorted(free, key=lambda i: (self._score(free[i]), i))
        wanted = 0 if self.config.max_rows is None else len(self.rows) - self.config.max_rows
        if policy["kind"] == "ttl":
            wanted = max(wanted, sum(self.clock - u.last_use >= policy["steps"] for u in free.values()))
            wanted = min(wanted, len(self.rows) - policy["min_rows"])
        if policy["max_evictions"] is not None:
            wanted = min(wanted, policy["max_evictions"])
        for i in order[: max(0, wanted)]:
            del self.rows[i]
            self.evicted[i] = self.clock

    def _score(self, use: Use) -> tuple[int, int]:
        assert self.config.eviction is not None
        return (use.count if self.config.eviction["kind"] == "lfu" else 0, use.last_use)


def drifting_ids(
    steps: int, per_step: int, *, spread: float = 30.0, drift: float = 2.0, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yield the ids int64 [per_step] of each step: a popular range that moves, with a long tail; negative ids too."""
    generator = np.random.default_rng(seed)
    for step in range(steps):
        centre = step * drift - 20.0
        yield np.floor(centre + spread * generator.standard_t(2.0, size=per_step)).astype(np.int64)
