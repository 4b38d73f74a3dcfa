"""Where rows of metrics go: a JSON Lines file always, W&B if wished. Only rank 0 has any.

A row is flushed to the operating system before `log` returns, so killing the process loses none.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

__all__ = ["EventLog", "JsonlSink", "NullSink", "Sink", "Sinks"]


class Sink(Protocol):
    """Takes rows and pictures."""

    def log(self, row: Mapping[str, float]) -> None:
        """One row of metrics; it has `step` and `nimg`."""
        ...

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        """A PNG that has been written."""
        ...

    def alert(self, title: str, text: str) -> None:
        """Something is wrong, and people should know."""
        ...

    def close(self) -> None:
        """Nothing comes after this."""
        ...


class NullSink:
    """Takes everything and does nothing: what the other ranks have."""

    def log(self, row: Mapping[str, float]) -> None:
        """Forget the row."""

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        """Forget the picture."""

    def alert(self, title: str, text: str) -> None:
        """Tell nobody."""

    def close(self) -> None:
        """Nothing to close."""


class Sinks:
    """Several sinks as one."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def log(self, row: Mapping[str, float]) -> None:
        """Pass on the row."""
        for sink in self.sinks:
            sink.log(row)

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        """Pass on the picture."""
        for sink in self.sinks:
            sink.log_picture(name, path, nimg=nimg, step=step)

    def alert(self, title: str, text: str) -> None:
        """Tell all."""
        for sink in self.sinks:
            sink.alert(title, text)

    def close(self) -> None:
        """Close all."""
        for sink in self.sinks:
            sink.close()


class JsonlSink:
    """metrics.jsonl: one JSON object a line, appended. A non-finite number is written as null."""

    def __init__(self, path: Path) -> None:
        self._file = _open_lines(path)

    def log(self, row: Mapping[str, float]) -> None:
        """Append the row."""
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        _write_line(self._file, finite)

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        """Pictures are files of their own."""

    def alert(self, title: str, text: str) -> None:
        """Alerts are events, in a file of their own."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class EventLog:
    """events.jsonl: what happened when, for people and reports."""

    def __init__(self, path: Path) -> None:
        self._file = _open_lines(path)

    def write(self, event: str, **fields: Any) -> None:
        """Append an event with the time in seconds since 1970."""
        _write_line(self._file, {"time": round(time.time(), 3), "event": event, **fields})

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open_lines(path: Path) -> TextIO:
    """Open for appending, after a newline if a killed writer left half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    size = file.seek(0, 2)
    if size:
        file.seek(size - 1)
        if file.read(1) != "\n":
            file.write("\n")
    return file


def _write_line(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()
