"""Start and resume runs: check, launch, follow."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config, load_config
from ganscale.config.run import merged, validated
from ganscale.errors import CheckpointError, ConfigError, GanscaleError
from ganscale.launch.held_run import HeldRun, run_session
from ganscale.launch.resolve_run import resolve_config
from ganscale.launch.supervisor import Supervisor
from ganscale.run_directory import RunDirectory
from ganscale.storage import RetryPolicy, is_url, retry
from ganscale.tracking.live_view import RunFollower, describe_event
from ganscale.tracking.sinks import EventLog
from ganscale.training.callbacks import Callback
from ganscale.training.stopping import TrainResult
from ganscale.world import launched_rank


def start(
    config: Config,
    console: Console,
    *,
    take_over: bool = False,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train as configured, on from the newest checkpoint if the run exists; waits for the end.

    SIGTERM and Ctrl-C end it early, with a checkpoint. Raises `RunInUse` if another process that is
    alive trains the run, unless `take_over`: then that one ends. `callbacks` are run by workers in
    this process; with others, `ConfigError` is raised.
    """
    if callbacks and config.launch.backend != "inprocess":
        raise ConfigError(
            f"callbacks are run in this process, but launch.backend={config.launch.backend}: "
            "set launch.backend=inprocess"
        )
    if launched_rank():  # torchrun starts many, of which one speaks
        console = Console(quiet=True, markup=False, emoji=False)
    config = resolve_config(config, console)
    run_dir = RunDirectory(config.run_dir)
    with (
        run_session(config, console, take_over=take_over) as held,
        RunFollower(run_dir, config.total_nimg, console),
    ):
        if held is None or config.launch.backend == "inprocess":
            from ganscale.launch.local import train_in_process

            session = None if held is None else held.session
            return train_in_process(config, session, callbacks)
        from ganscale.launch.ray_train import train_on_ray

        return train_on_ray(config, supervisor_of(config, held, console), held)


def supervisor_of(config: Config, held: HeldRun, console: Console) -> Supervisor:
    """What keeps the run going, and writes down what happens to its groups.

    Before the first attempt has begun it tells that on the console alone.
    """
    run_dir, store = RunDirectory(config.run_dir), CheckpointStore(config.checkpoints)

    policy, failure = RetryPolicy.of(config.data), f"{store.location} cannot be reached"
    seen: list[int] = []

    def newest_nimg() -> int:
        try:
            seen.append(retry(lambda: next((n.nimg for n in store.lineage()), -1), policy, failure))
        except GanscaleError:
            if not seen:
                raise
        return seen[-1]  # a store that is away for long shows no progress

    def note(event: str, **fields: Any) -> None:
        if not held.is_current():
            text = describe_event({"event": event, **fields})
            console.print(text, highlight=False, soft_wrap=True)
            return
        with suppress(OSError):  # a full disk is no reason to end a run
            log = EventLog(run_dir.events)
            log.write(event, **fields)
            log.close()

    return Supervisor(config, newest_nimg, note)


def resume_config(run: str, overrides: dict[str, object]) -> Config:
    """The configuration of the run whose folder, or whose checkpoints' URL, `run` is, with changes.

    The folder may have been moved, renamed or copied; the URL is that of a run that this host has
    not seen. Raises `CheckpointError` if it is no run, or has no checkpoint that verifies.
    """
    if is_url(run):
        location, _, name = run.rstrip("/").rpartition("/")
        store = CheckpointStore(run)
        failure = f"{store.location} cannot be reached"
        newest = retry(lambda: _newest_config(store), RetryPolicy(), failure)
        values = {"name": name, **(newest or {})}
        place = {"checkpoint.location": location, "name": name}
    else:
        run_dir = RunDirectory(Path(run).expanduser().absolute())
        if not run_dir.config.is_file():
            raise CheckpointError(f"{run} is not a run: it has no {run_dir.config.name}")
        place = {"storage": str(run_dir.root.parent), "name": run_dir.name}
        values = load_config(run_dir.config).model_dump()
        if shards := values["data"]["shards"]:
            values["data"]["shards"] = run_dir.moved(shards, values["storage"])
    config = validated(merged(values, {**place, **overrides}))
    store = CheckpointStore(config.checkpoints)
    policy, failure = RetryPolicy.of(config.data), f"{store.location} cannot be reached"
    if retry(lambda: all(map(store.verify, store.lineage())), policy, failure):
        if config.checkpoint.location is not None and values["name"] != config.name:
            raise CheckpointError(
                f"{run} was renamed from {values['name']}, but its checkpoints were not, and "
                f"{store.location} has none: rename one of the two, so that both have one name"
            )
        raise CheckpointError(
            f"{store.location} has no checkpoint that verifies. See: ganscale checkpoint "
            f"list {shlex.quote(run)}; to start anew, use ganscale train with another name"
        )
    return config


def _newest_config(store: CheckpointStore) -> dict[str, Any] | None:
    """That of the newest checkpoint whose documents verify."""
    for name in store.lineage():
        with suppress(CheckpointError):
            config: dict[str, Any] = store.describe(name)[0]["config"]
            return config
    return None
