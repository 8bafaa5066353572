"""Copies between host memory and a GPU go through pinned memory and are waited for once. On stand-ins for tensors."""

from typing import Any

import pytest
import torch
from grzoo.embeddings import transfer
from grzoo.embeddings.transfer import HOST, move

GPU = torch.device("cuda", 0)


class StandIn:
    """Writes down what is done to a tensor that may be on a GPU."""

    shape, dtype = (3,), torch.float32

    def __init__(self, log: list[str], device: torch.device, *, pinned: bool = False) -> None:
        self.log, self.device, self.pinned = log, device, pinned

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def pin_memory(self) -> "StandIn":
        self.log.append("pin")
        return StandIn(self.log, HOST, pinned=True)

    def to(self, device: torch.device, non_blocking: bool = False) -> "StandIn":
        if device == self.device:
            return self
        assert self.pinned and non_blocking, "a copy that the host waits for"
        self.log.append("up")
        return StandIn(self.log, device)

    def copy_(self, source: "StandIn", non_blocking: bool = False) -> "StandIn":
        assert self.pinned and non_blocking, "a copy that the host waits for"
        self.log.append("down")
        return self


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            done.append("wait")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(transfer, "empty_pinned", lambda shape, dtype: StandIn(done, HOST, pinned=True))
    return done


def test_copies_to_a_gpu_are_queued_through_pinned_memory(log: list[str]) -> None:
    given: list[Any] = [StandIn(log, HOST), StandIn(log, HOST), StandIn(log, GPU)]
    moved = move(given, GPU)
    assert [tensor.device for tensor in moved] == [GPU] * 3 and moved[2] is given[2]
    assert log == ["pin", "up", "pin", "up"]


def test_copies_to_the_host_are_waited_for_once(log: list[str]) -> None:
    given: list[Any] = [StandIn(log, GPU), StandIn(log, HOST), StandIn(log, GPU)]
    moved = move(given, [HOST, HOST, HOST])
    assert [tensor.device for tensor in moved] == [HOST] * 3 and moved[1] is given[1]
    assert log == ["down", "down", "wait"]


def test_without_a_gpu_nothing_is_copied() -> None:
    given = [torch.arange(3), torch.ones(2)]
    assert all(a is b for a, b in zip(move(given, HOST), given, strict=True))
    assert move([], HOST) == []
