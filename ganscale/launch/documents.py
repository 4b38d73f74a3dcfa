"""A run's documents where people look for them, though the workers are on other hosts.

Rank 0 writes rows, events, pictures and snapshots into the run's folder on its own host. Where the
driver's host does not see that folder, a copy grows in the driver's, so that what follows and shows
a run reads one folder. Where checkpoints go to an object store, a copy of the driver's folder is
kept beside them, in `documents/NAME`, and another host that goes on with the run begins with it.

Lines are copied within a second, other files when they have been left alone for a while, and all of
them at the end. What a host that dies had not sent is lost, but for rows: the checkpoint that the
run goes on from has those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import yaml

from ganscale.atomic_files import write_text
from ganscale.config import Config
from ganscale.errors import CheckpointError
from ganscale.json_lines import add_missing_lines, end_of_lines
from ganscale.periodic import PeriodicThread
from ganscale.run_directory import RunDirectory
from ganscale.storage import MissingData, RetryPolicy, Store, is_url, open_store, retry
from ganscale.storage.local import walk

if TYPE_CHECKING:  # they load torch, which the driver's side of a copy does without
    from ganscale.checkpoint import CheckpointStore

LINES = ("metrics.jsonl", "events.jsonl")
"""Files that only grow, line by line."""

_NOT_COPIED = ("checkpoints", "ray")
_SETTLED_SECONDS = 5.0
_PIECE_BYTES = 2**24


class IncompleteCopyWarning(UserWarning):
    """Some of what a run has written is not where people look for it."""


class Target(Protocol):
    """A place that keeps a copy. Its methods may raise anything."""

    def known(self) -> set[str]:
        """The files that it has already and that are as they are here."""
        ...

    def grow(self, name: str, path: Path, start: int, end: int) -> None:
        """Take lines: what a file has between two positions is new."""
        ...

    def put(self, name: str, pieces: Iterable[bytes]) -> None:
        """Take a whole file, in place of an earlier one."""
        ...


class Copy(PeriodicThread):
    """Keeps the copy of a run's folder up to date while the block runs.

    Args:
        root: the run's folder.
        target: keeps the copy.
        lines_seconds, files_seconds: between two looks at growing and at other files.
        is_allowed: asked before each look; nothing is copied while it says no.
        only: the first folders of what is copied; all if empty.
    """

    def __init__(
        self,
        root: Path,
        target: Target,
        *,
        lines_seconds: float,
        files_seconds: float,
        only: tuple[str, ...] = (),
        is_allowed: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__("documents", lines_seconds)
        self.problem = ""
        """Why the last try to copy failed; empty if it did not."""
        self._root = root
        self._target = target
        self._files_seconds = files_seconds
        self._only = only
        self._is_allowed = is_allowed
        self._sizes: dict[str, int] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        self._looked = -math.inf
        """When other files than those that grow were last looked at."""

    def _begin(self) -> None:
        known: set[str] = set()
        with suppress(Exception):  # of a store; then everything is copied
            known.update(self._target.known())
        with suppress(OSError):  # of a folder that cannot be read; `_tick` meets it again
            for name, path in self._files():
                if name in known:
                    with suppress(FileNotFoundError):  # removed meanwhile
                        self._stamps[name] = _stamp(path)
                        # A part of a line that a killed writer left is cut off before the next one.
                        self._sizes[name] = end_of_lines(path)
        self._looked = time.monotonic()

    def _finish(self) -> None:
        self._try(self._copy_lines)
        if not self.problem:
            self._try(lambda: self._copy_files(settled_seconds=-math.inf))

    def _tick(self) -> None:
        self._try(self._copy_lines)
        if time.monotonic() - self._looked > self._files_seconds:
            self._try(lambda: self._copy_files(settled_seconds=_SETTLED_SECONDS))
            self._looked = time.monotonic()

    def _try(self, action: Callable[[], None]) -> None:
        """What fails is tried again at the next look; training never waits for it."""
        try:
            if self._is_allowed():
                action()
            self.problem = ""
        except Exception as error:  # a store may raise anything
            self.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def _copy_lines(self) -> None:
        for name in LINES if not self._only else ():
            path, start = self._root / name, self._sizes.get(name, 0)
            end = end_of_lines(path, start)
            if end > start:
                self._target.grow(name, path, start, end)
                self._sizes[name] = end

    def _copy_files(self, settled_seconds: float) -> None:
        for name, path in self._files():
            if name in LINES:
                continue
            with suppress(FileNotFoundError):  # a snapshot that a better one has replaced
                stamp = _stamp(path)
                age = time.time() - path.stat().st_mtime
                if stamp != self._stamps.get(name) and age >= settled_seconds:
                    self._target.put(name, _pieces(path))
                    self._stamps[name] = stamp

    def _files(self) -> Iterator[tuple[str, Path]]:
        for path in files_below(self._root):
            name = path.relative_to(self._root)
            is_hidden = any(part.startswith(".") for part in name.parts)
            is_chosen = not self._only or name.parts[0] in self._only
            if is_hidden or not is_chosen or name.parts[0] in _NOT_COPIED:
                continue
            if path.is_file() and not path.is_symlink():
                yield name.as_posix(), path


class StoreCopy:
    """The copy in an object store, which has no file that grows."""

    def __init__(self, backend: Store, run: str) -> None:
        self._backend = backend
        self._run = run

    def known(self) -> set[str]:
        """All but what may have changed since: what lies at the top, lines among it."""
        prefix = f"{self._run}/"
        names = (n.removeprefix(prefix) for n in self._backend.files() if n.startswith(prefix))
        return {name for name in names if "/" in name}

    def grow(self, name: str, path: Path, start: int, end: int) -> None:
        """The whole file anew."""
        self.put(name, [path.read_bytes()[:end]])

    def put(self, name: str, pieces: Iterable[bytes]) -> None:
        """Write the object."""
        self._backend.replace(f"{self._run}/{name}", pieces)

    def events(self) -> bytes:
        """The events that were copied so far."""
        try:
            return b"".join(self._backend.chunks(f"{self._run}/events.jsonl"))
        except MissingData:
            return b""


def store_copy(config: Config) -> StoreCopy | None:
    """The copy that belongs to a run whose checkpoints are in an object store; else None."""
    location = config.checkpoint.location
    if location is None or not is_url(location):
        return None
    return StoreCopy(open_store(f"{location.rstrip('/')}/documents", for_writing=True), config.name)


def restore_run_dir(config: Config, store: CheckpointStore) -> None:
    """Bring what this host has not seen of a run into its folder, before anybody reads that.

    Rows, configuration and the W&B run come from the newest checkpoint whose documents verify,
    events from the copy in the store. Nothing comes where there is no checkpoint. Raises
    `StoreError` if the store stays out of reach for `data.store_deadline_seconds`.
    """
    run_dir = RunDirectory(config.run_dir)
    policy, failure = RetryPolicy.of(config.data), f"{store.location} cannot be reached"
    for name in retry(store.lineage, policy, failure):
        try:
            meta, history = retry(partial(store.describe, name), policy, failure)
        except CheckpointError:
            continue
        run_dir.root.mkdir(parents=True, exist_ok=True)
        add_missing_lines(run_dir.metrics, history)
        if meta["wandb_run_id"] and not run_dir.wandb_run_id.is_file():
            write_text(run_dir.wandb_run_id, meta["wandb_run_id"])
        if not run_dir.config.is_file():
            write_text(run_dir.config, yaml.safe_dump(meta["config"], sort_keys=False))
        if (copy := store_copy(config)) is not None:
            add_missing_lines(run_dir.events, retry(copy.events, policy, failure))
        return


def files_below(root: Path) -> list[Path]:
    """The files in a folder and in those below it, sorted; what is removed meanwhile is left out.

    `Path.rglob` raises an error if a folder vanishes before it is listed.
    """
    return sorted(Path(folder, name) for folder, _, names in walk(root) for name in names)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece
