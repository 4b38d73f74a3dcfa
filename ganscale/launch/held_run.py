"""How one process holds a run: other starts are refused, and a copy is told from a moved folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from ganscale.checkpoint import CheckpointStore, Heartbeat, Holder, Session
from ganscale.config import Config
from ganscale.config.changes import changed_settings
from ganscale.errors import ConfigError
from ganscale.launch.documents import Copy, restore_run_dir, store_copy
from ganscale.launch.resolve_run import previous_config
from ganscale.run_directory import RunDirectory
from ganscale.storage import RetryPolicy, retry
from ganscale.world import launched_rank


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
def run_session(
    config: Config, console: Console, *, take_over: bool = False
) -> Iterator[HeldRun | None]:
    """Let this process train a run while the block runs.

    Its folder and its checkpoints stay as they are until the first attempt begins. Yields None on
    ranks of torchrun other than 0, which write nothing. Raises `ConfigError` if the folder holds a
    run with other settings, `RunInUse` if another process that is alive trains the run, unless
    `take_over`.
    """
    if config.launch.backend == "inprocess" and launched_rank():
        _check_same_run(config, RunDirectory(config.run_dir))
        yield None
        return
    with hold(config, console, take_over=take_over) as held:
        restore_run_dir(config, CheckpointStore(config.checkpoints))
        _check_same_run(config, RunDirectory(config.run_dir))
        with _copied(config, console, held):
            yield held


@contextmanager
def _copied(config: Config, console: Console, held: HeldRun) -> Iterator[None]:
    """Keep a copy of the run's documents where its checkpoints are, if that is an object store."""
    target = store_copy(config)
    if target is None:
        yield
        return
    copy = Copy(
        config.run_dir, target, lines_seconds=60.0, files_seconds=60.0, is_allowed=held.is_current
    )
    try:
        with copy:
            yield
    finally:  # after an error too
        if copy.problem:
            text = f"the copy of {config.run_dir} beside the checkpoints is not complete: "
            console.print(f"{text}{copy.problem}", highlight=False, soft_wrap=True, style="yellow")


def _check_same_run(config: Config, run_dir: RunDirectory) -> None:
    begun = previous_config(config)
    if begun is None:
        return
    changed = changed_settings(begun, config)
    if changed:
        raise ConfigError(
            f"{run_dir.root} holds a run with other settings ({'; '.join(changed)}): "
            "choose another name=..., or go on with it by ganscale resume"
        )


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
