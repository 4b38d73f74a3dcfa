"""What a run's driver and its workers say to each other: an actor on the driver's host.

It keeps the messages of driver and workers, hands out the secrets that the driver was given, from
its memory, and takes up what rank 0 writes into the run's folder where the driver does not see that
folder. Whether it does is tried out: the driver leaves a file there, and rank 0 looks for it.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ganscale.json_lines import locked, open_lines
from ganscale.launch.documents import LINES, Copy, files_below
from ganscale.run_directory import RunDirectory
from ganscale.world import World

_AT_ONCE = ("config.yaml", "wandb_run_id", *LINES)
_LINES_SECONDS, _FILES_SECONDS = 1.0, 10.0


@dataclass(frozen=True)
class Messages:
    """What the driver and one group of workers leave for each other."""

    actor: Any
    """Handle of a `DriverActor`."""
    group: str
    """Which tells groups apart: one that was given up may live on for a while."""

    def put(self, name: str, value: Any) -> None:
        """Leave something, in place of what had that name. Raises `RayError` if it cannot."""
        ray.get(self.actor.put_message.remote(self.group, name, value))

    def get(self, name: str) -> Any:
        """What was left under a name; None if nothing was. Raises `RayError` if it cannot."""
        return ray.get(self.actor.message.remote(self.group, name))


class DriverActor:
    """The driver's side; runs in a process of its own on the driver's host."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)
        self._messages: dict[tuple[str, str], Any] = {}
        self._secrets: dict[str, str] = {}
        self._taken: dict[tuple[str, str], int] = {}

    def put_message(self, group: str, name: str, value: Any) -> None:
        """Keep a message."""
        self._messages[group, name] = value

    def message(self, group: str, name: str) -> Any:
        """A message, or None."""
        return self._messages.get((group, name))

    def keep(self, secrets: dict[str, str]) -> None:
        """Remember secrets, in memory only."""
        self._secrets = secrets

    def secrets(self) -> dict[str, str]:
        """What `keep` was given."""
        return self._secrets

    def documents(self) -> dict[str, bytes]:
        """What a host that has not seen the run begins with."""
        files = ((name, self._root / name) for name in _AT_ONCE)
        return {name: path.read_bytes() for name, path in files if path.is_file()}

    def append(self, sender: str, name: str, start: int, lines: bytes) -> None:
        """Take complete lines, which begin at `start` of the sender's file; those that came before,
        and whose answer was lost, are not taken twice."""
        known = max(0, self._taken.get((sender, name), 0) - start)
        with open_lines(self._root / name) as file, locked(file):
            file.write(lines[known:].decode())
            file.flush()
        self._taken[sender, name] = start + max(known, len(lines))

    def put(self, name: str, piece: bytes, *, start: bool, end: bool) -> None:
        """Take a piece of a file, which appears when it is whole."""
        path = self._root / name
        temporary = path.with_name(f".{path.name}.tmp")
        if start:
            path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb" if start else "ab") as file:
            file.write(piece)
        if end:
            temporary.replace(path)


def start_driver_actor(run_dir: Path, secrets: dict[str, str]) -> Any:
    """Start a `DriverActor` on this host, which ends with this driver; returns its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(DriverActor).options(num_cpus=0, scheduling_strategy=here)
    handle = actor.remote(str(run_dir))
    if secrets:  # as the argument of a method, they go to the actor's process and nowhere else
        ray.get(handle.keep.remote(secrets))
    return handle


@contextmanager
def marked(run_dir: Path, group: str) -> Iterator[None]:
    """Leave a mark in the run's folder for the time of the block."""
    mark = _mark(run_dir, group)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


@contextmanager
def copied_to_driver(messages: Messages, run_dir: Path, world: World) -> Iterator[Copy | None]:
    """While the block runs, send what this worker writes to the driver's host, unless that sees it
    anyway.

    Rank 0 begins with the documents as the driver has them; the others send stacks of hangs only.
    What could not be sent at the end is left for the driver in the message `not_copied`.
    """
    if _mark(run_dir, messages.group).is_file():
        yield None
        return
    driver = messages.actor
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        documents = ray.get(driver.documents.remote())
        for name in _AT_ONCE:  # one that is here and not there is left from another run
            (run_dir / name).unlink(missing_ok=True)
            if name in documents:
                (run_dir / name).write_bytes(documents[name])
    copy = Copy(
        run_dir,
        _DriverCopy(driver, run_dir),
        lines_seconds=_LINES_SECONDS,
        files_seconds=_FILES_SECONDS,
        only=() if world.is_main else (RunDirectory(run_dir).stacks.name,),
    )
    try:
        with copy:
            yield copy
    finally:
        if copy.problem:
            with suppress(RayError):  # then the driver is gone, or will hear that its actor is
                messages.put(
                    "not_copied",
                    f"not all that rank {world.rank} wrote into {run_dir} on "
                    f"{socket.gethostname()} was copied to this host: {copy.problem}",
                )


class _DriverCopy:
    def __init__(self, driver: Any, root: Path) -> None:
        self._driver = driver
        self._root = root
        self._sender = uuid.uuid4().hex

    def known(self) -> set[str]:
        """What lay here before the group began: the driver has it, or it is not the run's."""
        return {path.relative_to(self._root).as_posix() for path in files_below(self._root)}

    def grow(self, name: str, path: Path, start: int, end: int) -> None:
        """Only what is new."""
        with path.open("rb") as file:
            file.seek(start)
            lines = file.read(end - start)
        _wait_for(self._driver.append.remote(self._sender, name, start, lines))

    def put(self, name: str, pieces: Iterable[bytes]) -> None:
        """Piece by piece; a file without a byte is one empty piece."""
        pieces, start = iter(pieces), True
        piece = next(pieces, b"")
        while True:
            following = next(pieces, None)
            _wait_for(self._driver.put.remote(name, piece, start=start, end=following is None))
            if following is None:
                return
            piece, start = following, False


def _wait_for(call: Any) -> None:
    """Until an actor's method has ended. Raises what that raised, of which Ray makes an error of
    its own that begins with a traceback."""
    try:
        ray.get(call)
    except RayTaskError as error:
        raise error.cause from None


def _mark(run_dir: Path, group: str) -> Path:
    return run_dir / f".driver-{group}"
