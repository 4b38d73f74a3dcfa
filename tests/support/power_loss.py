"""What a disk may hold after the power has failed: all that was synced, and any part of the rest.

A function is traced system call by system call. Before each of them the tree of a folder is noted,
and which files and folders the function has synced so far. From that follow the states in which a
crash at this moment may leave the disk, by what POSIX promises and no more:

- The content of a file is what it was at its last fsync, or what it is now, or a part of that; a
  file that was never synced may be empty.
- The names in a folder are those of its last fsync, with any of the changes since then, in any
  order. A rename is one change: it has happened as a whole or not at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tests.support.syscalls import run_until_call

Tree = tuple[tuple[str, bytes | None], ...]
"""Paths with their bytes; None for a folder."""

_FSYNC, _FDATASYNC = 74, 75
"""Numbers of system calls on x86-64."""


@dataclass
class _Snapshot:
    """A folder's tree by inode numbers."""

    root: int
    names: dict[int, dict[str, int]] = field(default_factory=dict)
    """Of each folder: name to inode."""
    contents: dict[int, bytes] = field(default_factory=dict)
    """Of each file."""

    @classmethod
    def of(cls, root: Path) -> _Snapshot:
        snapshot = cls(root.stat().st_ino)
        for path in chain([root], root.rglob("*")):
            inode = path.stat().st_ino
            if path.is_dir():
                snapshot.names[inode] = {
                    child.name: child.stat().st_ino for child in path.iterdir()
                }
            else:
                snapshot.contents[inode] = path.read_bytes()
        return snapshot


class _Disk:
    """What of a folder's tree has reached the disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        snapshot = _Snapshot.of(root)
        self._names, self._contents = snapshot.names, snapshot.contents
        self._synced: int | None = None

    def states(self, pid: int) -> Iterator[Tree]:
        """The states of the disk after a crash just before the call at which a process stands."""
        now = _Snapshot.of(self._root)
        self._take_sync(now)
        # Inode numbers are used again.
        self._names = {inode: n for inode, n in self._names.items() if inode in now.names}
        self._contents = {i: data for i, data in self._contents.items() if i in now.contents}
        self._synced = _synced_inode(pid)
        for names in self._possible_names(now):
            for contents in self._possible_contents(now):
                yield tuple(sorted(_walk(now.root, "", names, contents)))

    def _take_sync(self, now: _Snapshot) -> None:
        """The call before this one has synced something, which nothing has changed since."""
        if self._synced in now.names:
            self._names[self._synced] = now.names[self._synced]
        if self._synced in now.contents:
            self._contents[self._synced] = now.contents[self._synced]

    def _possible_names(self, now: _Snapshot) -> Iterator[dict[int, dict[str, int]]]:
        """None of the changes, all, each alone, and all but each."""
        durable = {inode: self._names.get(inode, {}) for inode in now.names}
        changes = [
            (folder, change)
            for folder, names in now.names.items()
            for change in _changes(durable[folder], names)
        ]
        everything = list(range(len(changes)))
        chosen = [[], everything, *([n] for n in everything)]
        chosen += [[m for m in everything if m != n] for n in everything]
        for numbers in dict.fromkeys(map(tuple, chosen)):
            names = {folder: dict(entries) for folder, entries in durable.items()}
            for number in numbers:
                folder, change = changes[number]
                for name, inode in change.items():
                    if inode is None:
                        names[folder].pop(name, None)
                    else:
                        names[folder][name] = inode
            yield names

    def _possible_contents(self, now: _Snapshot) -> Iterator[dict[int, bytes]]:
        yield {inode: self._contents.get(inode, b"") for inode in now.contents}
        yield now.contents
        yield {
            inode: self._contents.get(inode, data[: len(data) // 2])
            for inode, data in now.contents.items()
        }


def _changes(before: dict[str, int], after: dict[str, int]) -> list[dict[str, int | None]]:
    """What has happened to the names of a folder, each change by itself."""
    changes: list[dict[str, int | None]] = []
    renamed = set()
    for name, inode in after.items():
        if before.get(name) != inode:
            old = {n for n, i in before.items() if i == inode and n not in after}
            renamed |= old
            changes.append({name: inode, **dict.fromkeys(old)})
    changes.extend({name: None} for name in sorted(before.keys() - after.keys() - renamed))
    return changes


def _synced_inode(pid: int) -> int | None:
    """What the call that a traced process is about to make syncs, if it does."""
    number, *arguments = Path(f"/proc/{pid}/syscall").read_text().split()
    if number not in (str(_FSYNC), str(_FDATASYNC)):
        return None
    return os.stat(f"/proc/{pid}/fd/{int(arguments[0], 16)}").st_ino


def _walk(
    folder: int, prefix: str, names: dict[int, dict[str, int]], contents: dict[int, bytes]
) -> Iterator[tuple[str, bytes | None]]:
    for name, inode in names[folder].items():
        path = f"{prefix}{name}"
        if inode in names:
            yield path, None
            yield from _walk(inode, f"{path}/", names, contents)
        elif inode in contents:
            yield path, contents[inode]


def states_after_power_loss(action: Callable[[], object], root: Path) -> list[list[Tree]]:
    """Run `action`, which works in `root`; returns for each of its system calls the states that the
    folder may be in if the power fails just before it. The first of each has only what is synced.
    """
    disk = _Disk(root)
    found: list[list[Tree]] = []

    def note(number: int, pid: int) -> None:
        found.append(list(dict.fromkeys(disk.states(pid))))

    assert not run_until_call(action, math.inf, note)
    return found
