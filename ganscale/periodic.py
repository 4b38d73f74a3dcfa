"""A thread that does something again and again while a `with` block runs.

The heartbeat of a run's holder, the console that follows a run, the lines about long work and the
copy of a run's documents are such threads. What they have in common is their beginning and end.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class PeriodicThread(ABC):
    """Calls `_tick` on a thread every `seconds` while a block runs, the first time after `seconds`.

    Leaving the block waits for a tick that is under way, and then calls `_finish`: nothing of the
    thread runs beside it. A tick that raises ends the thread, not the block.

    Args:
        name: of the thread, which stack dumps show.
        seconds: from the end of one tick to the beginning of the next.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self._seconds = seconds
        # An event and not a flag: leaving the block must not wait for the rest of an interval.
        self._stop = threading.Event()
        # A daemon, so that an interpreter that ends inside the block does not wait for ever.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._begin()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._finish()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._tick()

    @abstractmethod
    def _tick(self) -> None:
        """What is done again and again, on the thread."""

    def _begin(self) -> None:  # noqa: B027  # need not be overridden
        """What is done before the thread starts, on the caller's thread."""

    def _finish(self) -> None:  # noqa: B027
        """What is done after the thread has ended, on the caller's thread."""
