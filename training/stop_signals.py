"""Signals that end a run at the next step, with a checkpoint."""

import signal
import threading
from typing import Any


class StopSignals:
    """Inside the block the first SIGTERM or Ctrl-C is noted, so that work is saved; another acts as ever.

    Only the main thread gets signals; in another one nothing is noted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: object) -> None:
        self.received = number
        self.__exit__()
