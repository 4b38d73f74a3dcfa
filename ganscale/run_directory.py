"""Where everything of a run lies: `storage/name/` and the names inside it.

Whatever shows results reads these files; nothing hooks into the training code.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

__all__ = [
    "RunDirectory",
    "add_missing_lines",
    "end_of_lines",
    "locked",
    "open_lines",
    "write_text",
]

_PIECE_BYTES = 2**16


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run; nothing is created until somebody writes."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name, which is the folder's."""
        return self.root.name

    @property
    def config(self) -> Path:
        """The resolved configuration, as YAML."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line per logged step, with the attempt that logged it.

        Where an attempt starts from an earlier position, its rows replace those after that.
        """
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object a line per start, resume, checkpoint, fault, rollback, skip and end."""
        return self.root / "events.jsonl"

    @property
    def stacks(self) -> Path:
        """Stacks of the workers' threads, written when a step hung."""
        return self.root / "stacks"

    @property
    def wandb_run_id(self) -> Path:
        """The id of the run in W&B, the same for all its attempts."""
        return self.root / "wandb_run_id"

    @property
    def snapshots(self) -> Path:
        """Generators for inference, one safetensors file each; further averages in subfolders."""
        return self.root / "snapshots"

    def snapshot(self, nimg: int, average: str = "") -> Path:
        """A generator after `nimg` real images; `average` names one of several."""
        folder = self.snapshots / average if average else self.snapshots
        return folder / f"nimg-{nimg:012d}.safetensors"

    def sample_grid(self, nimg: int) -> Path:
        """The picture drawn after `nimg` real images."""
        return self.root / "samples" / f"kimg-{nimg / 1000:09.3f}.png"


def write_text(path: Path, text: str) -> None:
    """Write a small file; a kill leaves the one that was there, or this one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def open_lines(path: Path) -> TextIO:
    """Open a file of lines for appending, without the part of a line that a killed writer left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    with locked(file):
        if (end := end_of_lines(path)) < path.stat().st_size:
            file.truncate(end)
    return file


@contextmanager
def locked(file: IO[str] | IO[bytes]) -> Iterator[None]:
    """Keep other processes from taking the line that this one is writing for a killed writer's."""
    with suppress(OSError):  # a file system without locks
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
        end = file.seek(0, 2)
        while end > start:
            first = max(start, end - _PIECE_BYTES)
            file.seek(first)
            if (found := file.read(end - first).rfind(b"\n")) >= 0:
                return first + found + 1
            end = first
    return start


def add_missing_lines(path: Path, lines: bytes) -> None:
    """Append to a file of lines those that it does not have, in place of a part of a line."""
    there = path.read_bytes() if path.is_file() else b""
    known = set(there.splitlines())
    missing = [line for line in lines.splitlines() if line and line not in known]
    if missing:
        with open_lines(path) as file, locked(file):
            file.write(b"".join(line + b"\n" for line in missing).decode())
            file.flush()
