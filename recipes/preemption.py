"""Being told to end (SIGTERM): noted when it comes, acted upon by all ranks together at the end of a step."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from grzoo.embeddings.exchange import Exchange


class Preemption:
    """Notes SIGTERM while it is entered, instead of dying of it.

        with preemption:
            for step in steps:
                train(step)
                if preemption.is_due():    # on every rank, also when only one was told
                    save_and_leave()

    A scheduler that takes the machine away sends SIGTERM and kills some time later: that time must be enough for one
    step, an evaluation if one is due, and a save.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._is_told = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def is_due(self) -> bool:
        """Whether some rank was told to end. Collective."""
        return self.exchange.sum_int(int(self._is_told)) > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_told = True
