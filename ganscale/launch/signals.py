"""SIGTERM and Ctrl-C: the first asks the run to checkpoint and end, the second ends it at once.

Python runs signal handlers between two bytecodes of the main thread, which may be waiting in a
collective for a rank that is gone. So handlers do nothing here, and a thread that reads the numbers
of signals from a socket does the work.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ganscale.training.stopping import StopRequest
from ganscale.world import launched_rank

EXIT_CODES = {"terminated": 128 + signal.SIGTERM, "interrupted": 128 + signal.SIGINT}
"""The exit code of a run that was stopped, by the reason in its `TrainResult`."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_SECONDS = 0.5
"""Signals within this time of the first are one with it: `timeout`, torchrun, a terminal send to a
process and to its group."""


@contextmanager
def stopping_on_signals(stop: StopRequest, grace_seconds: float) -> Iterator[None]:
    """Set `stop` at the first signal; end this process at a second one, or after the grace time.

    In another thread than the main one, which alone gets signals, nothing is changed: they are the
    program's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    here, there = socket.socketpair()
    there.setblocking(False)
    listener = threading.Thread(
        target=_listen, args=(here, stop, grace_seconds), name="signals", daemon=True
    )
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    wakeup_before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        there.close()
        listener.join()
        here.close()


def _listen(here: socket.socket, stop: StopRequest, grace_seconds: float) -> None:
    """Until the other end is closed."""
    code, first = 0, 0.0
    while True:
        if code:
            here.settimeout(max(1e-3, first + grace_seconds - time.monotonic()))
        try:
            received = here.recv(1)
        except TimeoutError:
            _end_at_once(code, f"no end within {grace_seconds:g} s")
        if not received:
            return
        if received[0] not in _SIGNALS:
            continue
        if code:
            if time.monotonic() - first > _SAME_SECONDS:
                _end_at_once(code, "a second signal")
            continue
        code, first = 128 + received[0], time.monotonic()
        stop.reason = "terminated" if received[0] == signal.SIGTERM else "interrupted"
        doing = (
            f"finishing the step and writing a checkpoint, for at most {grace_seconds:g} s; a "
            "second signal ends at once"
        )
        name = signal.Signals(received[0]).name
        _say(f"\nganscale: {name}: {doing if stop.is_training else 'no longer waiting for room'}")


def _end_at_once(code: int, why: str) -> None:
    """Nothing is lost but what came after the last checkpoint."""
    _say(f"ganscale: {why}: ending without a checkpoint")
    os._exit(code)


def _say(text: str) -> None:
    """Tell it once, though torchrun passes a signal on to all ranks."""
    if launched_rank() == 0:
        print(text, file=sys.stderr, flush=True)
