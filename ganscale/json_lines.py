"""JSON Lines files: one object a line, appended, and read while they are being written.

A writer that is killed may leave an incomplete last line. Readers skip it, and the next writer
removes it. So a file needs neither a database nor a rename to grow by a line at a time, and any
tool can read it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TextIO

from ganscale.errors import naming_file

_PIECE_BYTES = 2**16


def encode_line(row: Mapping[str, Any]) -> bytes:
    """An object as a line of ASCII, with its newline."""
    return json.dumps(row).encode() + b"\n"


def append_line(file: TextIO, row: Mapping[str, Any]) -> None:
    """Append an object to a file that `open_lines` has opened, and flush it to the system."""
    # Locked, as another process that opens the file would take half a line for a killed writer's.
    with naming_file(Path(file.name)), locked(file):
        file.write(encode_line(row).decode())
        file.flush()


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """The objects of all lines that are valid JSON, so without an incomplete last line."""
    rows = []
    for line in data.splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, as `parse_lines` gives them; none if there is no file."""
    return parse_lines(path.read_bytes()) if path.is_file() else []


def open_lines(path: Path) -> TextIO:
    """Open a file of lines for appending, and remove the incomplete line of a killed writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    with locked(file):
        if (end := end_of_lines(path)) < path.stat().st_size:
            file.truncate(end)
    return file


@contextmanager
def locked(file: IO[str] | IO[bytes]) -> Iterator[None]:
    """Lock a file, so that no other process removes a line that is only being written."""
    # Some network file systems have no locks. Rows are then written without: the lock only guards
    # against a second writer that starts at the same moment.
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def end_of_lines(path: Path, start: int = 0) -> int:
    """Where the last complete line of a file ends, in bytes; `start` if none ends after that."""
    if not path.is_file():
        return start
    with path.open("rb") as file:
        # From the end, in pieces: files of long runs are large, and this is asked at every look.
        end = file.seek(0, 2)
        while end > start:
            first = max(start, end - _PIECE_BYTES)
            file.seek(first)
            if (newline := file.read(end - first).rfind(b"\n")) >= 0:
                return first + newline + 1
            end = first
    return start


def add_missing_lines(path: Path, lines: bytes) -> None:
    """Append those lines that a file does not have, after removing an incomplete last line."""
    # By their text: rows name attempt and position, so an equal line is the same row. What another
    # host wrote is added to what this one has, in whatever order; `history` sorts it.
    there = path.read_bytes() if path.is_file() else b""
    known = set(there.splitlines())
    missing = [line for line in lines.splitlines() if line and line not in known]
    if missing:
        with open_lines(path) as file, locked(file):
            file.write(b"".join(line + b"\n" for line in missing).decode())
            file.flush()
