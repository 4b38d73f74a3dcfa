"""Which process holds a run, and whether it is alive.

Every attempt names the process that started it, its holder. While that process lives it renews a
file beside the attempts, `attempts/session-TOKEN.json`, and removes it when it ends. A start that
finds another holder decides by the first of these that applies:

- The file is gone: the holder has ended.
- The holder ran on this machine: the operating system knows whether the process still exists.
- Otherwise: the holder is alive if its file changes within `SILENT_SECONDS`. The observer measures
  that with its own clock. Clocks of two hosts are compared only to save this wait: a file that was
  renewed more than `SILENT_SECONDS + CLOCK_TOLERANCE_SECONDS` ago is not waited for.

This protects against mistakes, such as one run started twice. Correctness does not depend on it:
`store` and `lineage` keep out what an older attempt writes after a newer one has begun, whether or
not anybody was right about who is alive.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from ganscale.periodic import PeriodicThread
from ganscale.processes import machine_id, process_start
from ganscale.storage import MissingData, Store

BEAT_SECONDS = 10.0
"""Between two renewals of a holder's file."""
SILENT_SECONDS = 60.0
"""A holder on another machine whose file has not changed for so long is dead.

Six renewals: one or two that a busy store loses do not make a live run look dead.
"""
CLOCK_TOLERANCE_SECONDS = 600.0
"""By how much the clocks of two hosts may differ."""
_POLL_SECONDS = 1.0
_BEAT_FILE = re.compile(r"attempts/session-([0-9a-f]+)\.json")


@dataclass(frozen=True)
class Holder:
    """The process that started a run. Its attempts name it; they may run in other processes."""

    session: str
    """A random token, which all attempts of this start share."""
    host: str
    machine: str
    """What process ids refer to: the boot of a machine, and the container on it."""
    pid: int
    process_start: str
    """When the process began, as its machine counts; a reused pid has another."""
    since: float
    """When the run was started, in seconds since 1970."""
    run_dir: str
    """Absolute path of the run's folder on `host`."""

    @classmethod
    def here(cls, run_dir: Path) -> Self:
        """The holder that this process is."""
        pid = os.getpid()
        return cls(
            session=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=machine_id(),
            pid=pid,
            process_start=process_start(pid) or "",
            since=round(time.time(), 3),
            run_dir=str(run_dir),
        )

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.pid} on {self.host} since {since}"

    @property
    def beat_file(self) -> str:
        """The file that the holder renews, relative to the run's checkpoints."""
        return f"attempts/session-{self.session}.json"

    def beat(self, backend: Store) -> None:
        """Write the current time to the holder's file, which shows that it is alive."""
        backend.replace(self.beat_file, [json.dumps({"time": time.time()}).encode()])

    def is_alive(self, backend: Store, report: Callable[[str], None] = lambda text: None) -> bool:
        """Whether the holder still runs.

        May take `SILENT_SECONDS`; `report` then gets a message for the user.
        """
        seen = _contents(backend, self.beat_file)
        if seen is None:
            return False
        # The id alone is not enough, since the system reuses ids; with the time of the start it
        # names one process for good, and no waiting is needed.
        if self.machine == machine_id():
            return process_start(self.pid) == self.process_start
        if time.time() - _time_of(seen) > SILENT_SECONDS + CLOCK_TOLERANCE_SECONDS:
            return False
        report(
            f"{backend.location} was last held by {self}; waiting up to {SILENT_SECONDS:g} s for a "
            "sign that it is alive"
        )
        # Any change counts, whatever time the file states: only our own clock measures.
        deadline = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            if (now := _contents(backend, self.beat_file)) != seen:
                return now is not None
        return False


@dataclass(frozen=True)
class Session:
    """One start of a run by a user, a scheduler or a sweep; it may make many attempts."""

    holder: Holder
    newest_attempt: int
    """The number of the newest attempt when the run was free to be started, 0 without any. A later
    attempt of another session means that this one has lost the run."""
    copied_from: str = ""
    """The folder of the run that this run's folder is a copy of; empty if it is none."""


class Heartbeat(PeriodicThread):
    """Renews the holder's file while the block runs, once the first claim has made the file."""

    def __init__(self, backend: Store, holder: Holder) -> None:
        super().__init__("holder", BEAT_SECONDS)
        self._backend = backend
        self._holder = holder

    def _tick(self) -> None:
        with suppress(Exception):  # the store cannot be reached; the next beat may reach it
            # Renewed, never made here. The first claim makes it, so that a start that is refused
            # leaves nothing behind; and whoever takes the run over removes it for good.
            if self._backend.exists(self._holder.beat_file):
                self._holder.beat(self._backend)

    def _finish(self) -> None:
        with suppress(Exception):  # the store cannot be reached: the file falls silent instead
            self._backend.remove(self._holder.beat_file)


def beat_files(files: list[str]) -> list[str]:
    """Those of `files` that holders renew."""
    return [file for file in files if _BEAT_FILE.fullmatch(file)]


def _contents(backend: Store, name: str) -> bytes | None:
    try:
        return backend.read(name)
    except MissingData:
        return None


def _time_of(beat: bytes) -> float:
    """When a file was renewed; now, if it does not say, so that it is waited for."""
    with suppress(ValueError, KeyError, TypeError):
        return float(json.loads(beat)["time"])
    return time.time()
