"""Run a sweep on Ray Tune: trials are runs in the sweep's folder, the book says how each stands.

Tune starts the trials' actors, waits for room, and asks its schedulers. A new Tune experiment is
made each time the sweep is started, of the trials that are not over; what Tune has stored of an
earlier one is never read.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from rich.console import Console

from ganscale.config.sweep import Population, Sweep
from ganscale.errors import ConfigError, GanscaleError
from ganscale.launch.driver_actor import Messages, start_driver_actor
from ganscale.launch.ray_cluster import cluster
from ganscale.launch.secrets import NAMES_VARIABLE, for_workers
from ganscale.launch.signals import stopping_on_signals
from ganscale.launch.start import settled
from ganscale.launch.sweep_book import Book
from ganscale.launch.sweep_schedulers import finish_copies, scheduler_for, trial_name
from ganscale.launch.sweep_table import SweepDisplay
from ganscale.launch.sweep_trial import Surroundings, TrialActor
from ganscale.tracking.wandb_sink import variables
from ganscale.training.stopping import StopRequest

__all__ = ["run_sweep"]

# Read by Tune: no files of its own that nobody reads, no opinions on standard error.
_TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "100000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "100000000",
    "TUNE_WARN_THRESHOLD_S": "100000000",
}
_POLL_SECONDS = 0.3
_HEAD = "node:__internal_head__"
"""A resource that each cluster has one of, and shares in any parts."""
_MAX_GROUPS = 25
"""That can share it."""


def run_sweep(sweep: Sweep, console: Console) -> tuple[Book, str]:
    """Run the trials that are not over, and wait; returns the standings, and why it was stopped.

    SIGTERM and Ctrl-C end it early, with a checkpoint of each trial.
    """
    sweep = replace(sweep, base=settled(sweep.base, console))
    book = Book(sweep)
    book.open()
    stop = StopRequest()
    launch = sweep.base.launch
    for name, value in _environment(launch):
        os.environ.setdefault(name, value)
    shutil.rmtree(_tune_folder(book), ignore_errors=True)
    try:
        finish_copies(book)
        if not book.unfinished:
            return book, ""
        # In this order: Ray replaces the handlers of signals when it starts.
        with (
            cluster(launch.ray_address) as is_joined,
            stopping_on_signals(stop, launch.grace_seconds),
            SweepDisplay(book, console) as display,
        ):
            _fit(book, stop, display.refresh, is_joined=is_joined)
    finally:
        book.close()
        shutil.rmtree(_tune_folder(book), ignore_errors=True)
    return book, stop.reason


def _tune_folder(book: Book) -> Path:
    return book.sweep.root / "ray"


def _environment(launch: Any) -> list[tuple[str, str]]:
    seconds = str(math.ceil(launch.grace_seconds) + 30)
    return [*_TUNE_ENVIRONMENT.items(), ("TUNE_FORCE_TRIAL_CLEANUP_S", seconds)]


def _fit(book: Book, stop: StopRequest, changed: Callable[[str], None], *, is_joined: bool) -> None:
    """Let Tune run the trials; meanwhile pass on `stop`."""
    messages = _messages(book.sweep.root)
    options = _options(book, messages, stop, changed, is_joined=is_joined)
    problem: list[BaseException] = []

    def fit() -> None:
        try:
            tune.run(**options)
        except BaseException as error:
            problem.append(error)

    # Not in the main thread, where Tune would replace our signal handlers by its own.
    thread = threading.Thread(target=fit, name="tune", daemon=True)
    thread.start()
    passed_on = ""
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        if stop.reason != passed_on:
            passed_on = stop.reason
            messages.put("stop", passed_on)
    if problem:
        text = " ".join(str(problem[0]).split())[:300]
        raise GanscaleError(f"the sweep failed: {text}") from problem[0]


def _options(
    book: Book,
    messages: Messages,
    stop: StopRequest,
    changed: Callable[[str], None],
    *,
    is_joined: bool,
) -> dict[str, Any]:
    """What Tune is to run: `tune.run`, as `Tuner` pickles all that it is given."""
    sweep = book.sweep
    file, launch = sweep.file, sweep.base.launch
    is_population = isinstance(file.scheduler, Population)
    around = Surroundings(sweep, messages, variables(), is_joined)
    trials = [
        {
            "name": s.name,
            "values": s.values,
            # A population's trials tell again what the round that was cut off has to know.
            "after_kimg": book.round_kimg if is_population else s.kimg,
        }
        for s in book.unfinished
    ]
    actor = tune.with_parameters(TrialActor, surroundings=around)
    by_head = _limited_by_head(sweep, is_joined=is_joined)
    return {
        "run_or_experiment": tune.with_resources(actor, _resources(sweep, limited_by_head=by_head)),
        "name": messages.group,
        "storage_path": str(_tune_folder(book)),
        "config": {"trial": tune.grid_search(trials)},
        "scheduler": scheduler_for(book),
        "max_concurrent_trials": None if is_population or by_head else file.max_concurrent,
        "reuse_actors": True,
        "stop": _Stopper(stop),
        "max_failures": launch.max_failures,
        "raise_on_failed_trial": False,
        "callbacks": [_Scribe(book, changed)],
        "trial_dirname_creator": trial_name,
        "verbose": 0,
    }


def _messages(root: Path) -> Messages:
    """What this host and the trials say to each other; it hands out secrets as well."""
    given = for_workers()
    secret = {**given, NAMES_VARIABLE: ",".join(given)} if given else {}
    return Messages(start_driver_actor(root, secret), secrets.token_hex(8))


def _limited_by_head(sweep: Sweep, *, is_joined: bool) -> bool:
    """Whether trials take parts of the head's resource, so that no more than wanted run at once.

    Trials that start groups of workers take nothing else. Tune's own limit counts trials that wait
    for others, so a population would never be complete; its trials of one worker are held to the
    head's host only where there is no other.
    """
    file, is_group = sweep.file, sweep.base.launch.max_workers > 1
    is_population = isinstance(file.scheduler, Population)
    if is_population and file.max_concurrent and is_joined and not is_group:
        raise ConfigError(
            "max_concurrent holds a population's trials to the head's host: leave it out on a "
            "cluster, which starts as many trials as it has room for"
        )
    return is_group or bool(is_population and file.max_concurrent)


def _resources(sweep: Sweep, *, limited_by_head: bool) -> dict[str, float]:
    """What Tune reserves for a trial; groups of workers reserve their own places."""
    launch, resources = sweep.base.launch, {"CPU": 0.0}
    if launch.max_workers == 1:
        resources = {"CPU": launch.cpus_per_worker}
        if launch.use_gpu:
            resources["GPU"] = 1.0
    if limited_by_head:
        # One more does not fit, and what is left is enough for Ray Train, which takes a thousandth
        # of it for each group.
        resources[_HEAD] = math.floor(10_000 / (_at_once(sweep) + 0.9)) / 10_000
    return resources


def _at_once(sweep: Sweep) -> int:
    """How many trials may run: as wanted, else as many groups as there is room for."""
    if sweep.file.max_concurrent is not None:
        return min(sweep.file.max_concurrent, _MAX_GROUPS)
    launch, there = sweep.base.launch, ray.cluster_resources()
    fits = there.get("CPU", 0.0) / launch.cpus_per_worker
    if launch.use_gpu:
        fits = min(fits, there.get("GPU", 0.0))
    return min(max(1, int(fits / launch.min_workers + 1e-6)), _MAX_GROUPS)


class _Stopper(tune.Stopper):  # type: ignore[misc]
    """Ends the sweep when it is asked to."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No result ends a trial here."""
        return False

    def stop_all(self) -> bool:
        """Whether all trials are to end."""
        return bool(self._stop.reason)


class _Scribe(tune.Callback):  # type: ignore[misc]
    """Writes into the book what Tune hears, and tells the display."""

    def __init__(self, book: Book, changed: Callable[[str], None]) -> None:
        self._book = book
        self._changed = changed

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial's actor begins."""
        self._book.started(trial_name(trial))
        self._changed("")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """A result, with what the scheduler made of it: `done` without an end is a stop."""
        name, state = trial_name(trial), result["state"]
        if state in ("failed", "interrupted"):
            self._book.ended(name, state, result["message"])
        else:
            state = state or ("stopped" if result["done"] else "running")
            score = result["score"] if math.isfinite(result["score"]) else None
            if not self._book.result(name, result["kimg"], score, state):
                return
        self._changed(name)

    def on_trial_save(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial waits for the others of its population."""
        self._book.paused(trial_name(trial))
        self._changed("")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial failed more often than it may."""
        name = trial_name(trial)
        self._book.ended(name, "failed", _last_line(trial.error_file))
        self._changed(name)


def _last_line(file: str | None) -> str:
    """What an error file of Tune's ends with, which is the error itself."""
    lines = Path(file).read_text(encoding="utf-8").splitlines() if file else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "its process died")
