"""Sinks for rows of metrics and for events: always JSON Lines files, others if configured.

Rank 0 passes the same rows and events to all sinks, so that the loop has one code path for W&B,
Ray's metrics and others; the other ranks have a sink that does nothing, so that it need not ask for
its rank. A row is flushed to the operating system before `log` returns: a process that is killed
loses none. It is not fsynced, as after a crash of the machine training resumes at a checkpoint,
which holds the rows up to there.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ganscale.json_lines import append_line, open_lines

Row = Mapping[str, Any]

WRONG = (
    "alarm",
    "checkpoint_failed",
    "evaluation_failed",
    "fault",
    "group_lost",
    "stall",
    "wandb",
)
"""Events that people should know of."""

FAULTS = (
    "alarm",
    "checkpoint_failed",
    "evaluation_failed",
    "fault",
    "group_lost",
    "resume",
    "rollback",
    "skip",
    "stall",
)
"""Events that dashboards count and draw over the curves: what went wrong, and what was done."""


class Sink(Protocol):
    """Takes metrics, pictures and events of a run; no method waits for a network."""

    def begin(self, rows: Sequence[Row], events: Sequence[Row]) -> None:
        """The rows and events that the run's files hold already. Called once, before all others."""
        ...

    def log(self, row: Row) -> None:
        """One row of metrics; it has `step` and `nimg`."""
        ...

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        """A PNG that has been written."""
        ...

    def event(self, event: Row) -> None:
        """A line of events.jsonl; may come from any thread."""
        ...

    def close(self) -> None:
        """Release what the sink holds; no other method is called after this."""
        ...


class NullSink:
    """Takes everything and does nothing: for ranks other than 0, and as a base for other sinks."""

    def begin(self, rows: Sequence[Row], events: Sequence[Row]) -> None:
        return

    def log(self, row: Row) -> None:
        return

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        return

    def event(self, event: Row) -> None:
        return

    def close(self) -> None:
        return


class Sinks:
    """Passes everything on to several sinks."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def begin(self, rows: Sequence[Row], events: Sequence[Row]) -> None:
        for sink in self.sinks:
            sink.begin(rows, events)

    def log(self, row: Row) -> None:
        for sink in self.sinks:
            sink.log(row)

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        for sink in self.sinks:
            sink.log_picture(name, path, nimg=nimg, step=step)

    def event(self, event: Row) -> None:
        for sink in self.sinks:
            sink.event(event)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class JsonlSink(NullSink):
    """metrics.jsonl: one JSON object a line, appended. A non-finite number is written as null."""

    def __init__(self, path: Path) -> None:
        self._file = open_lines(path)

    def log(self, row: Row) -> None:
        # JSON has no infinity and no NaN; Python would write names that other readers refuse.
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        append_line(self._file, finite)

    def close(self) -> None:
        self._file.close()


class EventLog:
    """events.jsonl: what happened when, for people and reports."""

    def __init__(self, path: Path) -> None:
        self._file = open_lines(path)

    def write(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append an event with the time in seconds since 1970; returns what was written."""
        row = {"time": round(time.time(), 3), "event": event, **fields}
        append_line(self._file, row)
        return row

    def close(self) -> None:
        self._file.close()


class FaultCounts:
    """How many of each fault there were since the run began, in all of its attempts."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, event: Row) -> bool:
        """Count the event; returns whether it is a fault."""
        is_fault = event["event"] in FAULTS
        self._counts[event["event"]] += is_fault
        return is_fault

    def __getitem__(self, fault: str) -> int:
        return self._counts[fault]
