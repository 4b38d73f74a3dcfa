"""Threads that do something again and again while a block runs."""

from __future__ import annotations

import threading
import time

import pytest

from ganscale.periodic import PeriodicThread

WAIT = 200.0


class Recorder(PeriodicThread):
    def __init__(self, seconds: float = 0.01) -> None:
        super().__init__("recorder", seconds)
        self.calls: list[str] = []
        self.ticked = threading.Event()

    def _begin(self) -> None:
        self.calls.append("begin")

    def _tick(self) -> None:
        self.calls.append(threading.current_thread().name)
        self.ticked.set()

    def _finish(self) -> None:
        self.calls.append("finish")


def test_it_ticks_on_its_thread_between_begin_and_finish() -> None:
    with Recorder() as recorder:
        assert recorder.ticked.wait(WAIT)
    assert (recorder.calls[0], recorder.calls[-1]) == ("begin", "finish")
    assert set(recorder.calls[1:-1]) == {"recorder"}
    calls = list(recorder.calls)
    time.sleep(0.05)
    assert recorder.calls == calls


def test_leaving_the_block_does_not_wait_for_the_interval() -> None:
    began = time.monotonic()
    with Recorder(seconds=WAIT):
        pass
    assert time.monotonic() - began < WAIT / 2


def test_an_error_of_the_block_ends_the_thread_and_is_passed_on() -> None:
    recorder = Recorder()
    with pytest.raises(KeyError), recorder:
        raise KeyError
    assert recorder.calls[-1] == "finish"
    assert not recorder._thread.is_alive()
