"""Where rows of metrics and events go: JSON Lines files always, others if wished. Rank 0 has them.

What a run tells is told to all alike, so W&B, Ray's metrics and whatever comes next are one code
path in the loop. A row is flushed to the operating system before `log` returns, so killing the
process loses none.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ganscale.json_lines import append_line, open_lines

__all__ = ["FAULTS", "WRONG", "EventLog", "FaultCounts", "JsonlSink", "NullSink", "Sink", "Sinks"]

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
    """Takes what a run tells of itself. Nothing here may fail or wait for a network."""

    def begin(self, rows: Sequence[Row], events: Sequence[Row]) -> None:
        """What the run's files hold already; comes first, once."""
        ...

    def log(self, row: Row) -> None:
        """One row of metrics; it has `step` and `nimg`."""
        ...

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        """A PNG that has been written."""
        ...

    def log_snapshot(self, path: Path, *, average: str, nimg: int) -> None:
        """A snapshot that has been written; `average` is "best" or the name of an average."""
        ...

    def event(self, event: Row) -> None:
        """A line of events.jsonl; may come from any thread."""
        ...

    def close(self) -> None:
        """Nothing comes after this."""
        ...


class NullSink:
    """Takes everything and does nothing: what the other ranks have, and what others build upon."""

    def begin(self, rows: Sequence[Row], events: Sequence[Row]) -> None:
        """Forget what was."""

    def log(self, row: Row) -> None:
        """Forget the row."""

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        """Forget the picture."""

    def log_snapshot(self, path: Path, *, average: str, nimg: int) -> None:
        """Forget the snapshot."""

    def event(self, event: Row) -> None:
        """Forget the event."""

    def close(self) -> None:
        """Nothing to close."""


class Sinks:
    """Several sinks as one."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def begin(self, rows: Sequence[Row], events: Sequence[Row]) -> None:
        """Tell all."""
        for sink in self.sinks:
            sink.begin(rows, events)

    def log(self, row: Row) -> None:
        """Pass on the row."""
        for sink in self.sinks:
            sink.log(row)

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        """Pass on the picture."""
        for sink in self.sinks:
            sink.log_picture(name, path, nimg=nimg, step=step)

    def log_snapshot(self, path: Path, *, average: str, nimg: int) -> None:
        """Pass on the snapshot."""
        for sink in self.sinks:
            sink.log_snapshot(path, average=average, nimg=nimg)

    def event(self, event: Row) -> None:
        """Pass on the event."""
        for sink in self.sinks:
            sink.event(event)

    def close(self) -> None:
        """Close all."""
        for sink in self.sinks:
            sink.close()


class JsonlSink(NullSink):
    """metrics.jsonl: one JSON object a line, appended. A non-finite number is written as null."""

    def __init__(self, path: Path) -> None:
        self._file = open_lines(path)

    def log(self, row: Row) -> None:
        """Append the row."""
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        append_line(self._file, finite)

    def close(self) -> None:
        """Close the file."""
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
        """Close the file."""
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
