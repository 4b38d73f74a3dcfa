"""The driver's hold on a run: a second start is refused, and a copy is told from a moved folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from ganscale.checkpoint import CheckpointStore, Heartbeat, Holder, Session
from ganscale.config import Config
from ganscale.storage import RetryPolicy, retry


class HeldRun:
    """A run that this process may train; `session` goes to the worker that begins its attempts."""

    def __init__(self, store: CheckpointStore, session: Session) -> None:
        self.session = session
        self._store = store
        self._was_current = False

    def is_current(self) -> bool:
        """Whether an attempt of this start has begun, and no other start has begun one since.

        Only then may the run's files be changed. While the store is away, it is as it was.
        """
        with suppress(Exception):  # a store may raise anything
            newest = self._store.newest_attempt()
            self._was_current = newest is not None and newest.holder == self.session.holder
        return self._was_current

    def require_free(self) -> None:
        """Raise `RunInUse` if another process that is alive has begun an attempt meanwhile."""
        self._store.require_free(self.session.holder, self.session.newest_attempt)


@contextmanager
def hold(config: Config, console: Console, *, take_over: bool) -> Iterator[HeldRun]:
    """Hold a run while the block runs. Nothing of the run is changed until an attempt begins.

    Raises `RunInUse` if another process that is alive holds it, unless `take_over`.
    """

    def report(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    store, holder = CheckpointStore(config.checkpoints), Holder.here(config.run_dir)
    policy, failure = RetryPolicy.of(config.data), f"{store.location} cannot be reached"
    original = retry(lambda: _original_of(config, store), policy, failure)
    if original:
        report(f"{config.run_dir} is a copy of {original}: it goes on as a run of its own")
    # What holds the original does not hold its copy.
    known = sys.maxsize if take_over or original else 0
    newest = retry(lambda: store.require_free(holder, known, report), policy, failure)
    with Heartbeat(store.backend, holder):
        yield HeldRun(store, Session(holder, newest, original))


def _original_of(config: Config, store: CheckpointStore) -> str:
    """The folder of which the run's folder is a copy; empty if it is none, or was moved or renamed.

    Attempts name the folder of their run. Where that is another one, and it still holds the run,
    this one must be a copy. A run whose checkpoints are not in its folder cannot be copied with it.
    """
    attempts = store.attempts() if config.checkpoint.location is None else []
    if not attempts or attempts[-1].holder is None:
        return ""
    folder = Path(attempts[-1].holder.run_dir)
    if not folder.is_dir() or folder.samefile(config.run_dir):
        return ""
    others = CheckpointStore(folder / Path(store.location).name).attempts()
    return str(folder) if others and others[0].token == attempts[0].token else ""
