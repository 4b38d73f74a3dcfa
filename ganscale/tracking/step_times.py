"""Where the time of a step goes: how long each of its parts took, at the price of a time stamp.

On a GPU the stamps are events of its stream, read when a row is logged, so nothing waits for the
GPU meanwhile. They measure the GPU's time: `data_wait` is how long the GPU was idle for want of
data, not how long the host, which runs ahead of it, waited.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch

_MAX_MARKS = 4096
"""Stamps that are kept before those that have passed are added up."""


class StepTimes:
    """Seconds of the parts of steps, added up between two rows.

    Args:
        device: whose time it is.
        stamp: makes a time stamp; the default is the device's.
        seconds: between two stamps, the second of which has passed.
        has_passed: whether a stamp has passed, without waiting.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        stamp: Callable[[], object] | None = None,
        seconds: Callable[[object, object], float] | None = None,
        has_passed: Callable[[object], bool] | None = None,
    ) -> None:
        on_gpu = device.type == "cuda"
        self._stamp = stamp or (_cuda_stamp if on_gpu else time.perf_counter)
        self._seconds = seconds or (_cuda_seconds if on_gpu else _host_seconds)
        self._has_passed = has_passed or (_cuda_has_passed if on_gpu else _always)
        self._marks: list[tuple[str, object]] = []
        self._sums: dict[str, float] = defaultdict(float)
        self.num_steps = 0

    def enter(self, part: str) -> None:
        """A part begins here, and ends where the next one does."""
        self._marks.append((part, self._stamp()))
        # Between rows far apart thousands of events would pile up. Those that have passed can be
        # read without waiting for the device.
        if len(self._marks) >= _MAX_MARKS:
            self._add_up(wait=False)

    def means(self) -> dict[str, float]:
        """Seconds a step by part since the last call, up to here; starts anew.

        Call it when the device has done its work, or it is waited for.
        """
        self.enter("")
        self._add_up(wait=True)
        steps = max(1, self.num_steps)
        means = {part: seconds / steps for part, seconds in self._sums.items() if part}
        self._sums.clear()
        self.num_steps = 0
        return means

    def _add_up(self, *, wait: bool) -> None:
        """Add up intervals that are over; the last stamp stays, as the start of the next one."""
        done = 0
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if not wait and not self._has_passed(end):
                break
            self._sums[part] += self._seconds(begin, end)
            done += 1
        del self._marks[:done]


def _host_seconds(begin: object, end: object) -> float:
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin


def _always(stamp: object) -> bool:
    return True


def _cuda_stamp() -> object:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _cuda_seconds(begin: object, end: object) -> float:
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000


def _cuda_has_passed(stamp: object) -> bool:
    assert isinstance(stamp, torch.cuda.Event)
    passed: bool = stamp.query()
    return passed
