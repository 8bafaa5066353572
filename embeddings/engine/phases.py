"""Seconds per phase of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Adds up the time of named phases: host time, or on a GPU the time between events on the current stream.

    Nothing is synchronised until `seconds()`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the `with` block for `name`; a name may come several times."""
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            begin_time = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - begin_time)

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far; waits for a GPU to finish them."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._add(name, begin.elapsed_time(end) / 1000)
        self._events.clear()
        return dict(self._seconds)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
