"""Run a sweep on Ray Tune: its trials are runs in the sweep's folder.

Each start makes a new Tune experiment of the trials that are not over, whose runs go on from their
newest checkpoints. What Tune has stored of an earlier one is never read: it is written in place, so
a kill may cut it short, and it lacks what the schedulers know.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune import schedulers
from rich.console import Console

from ganscale.checkpoint import CheckpointStore, Heartbeat, Holder, RunInUse, Session
from ganscale.config.search_space import generator_for
from ganscale.config.sweep import Asha, Population, Sweep
from ganscale.errors import GanscaleError
from ganscale.launch.driver_actor import Messages, start_driver_actor
from ganscale.launch.ray_cluster import cluster, num_workers_fitting, require_capacity
from ganscale.launch.resolve_run import resolve_config
from ganscale.launch.secrets import NAMES_VARIABLE, for_workers
from ganscale.launch.signals import stopping_on_signals
from ganscale.launch.sweep_status import TrialStatus, copy_trial, read_status
from ganscale.launch.sweep_table import displayed
from ganscale.launch.sweep_trial import SweepTrial
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import EventLog
from ganscale.tracking.wandb_sink import variables
from ganscale.training.stopping import StopRequest

# Read by Tune: no files that nobody reads, no signal handlers, no other output.
_TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


def run_sweep(sweep: Sweep, console: Console) -> tuple[list[TrialStatus], str]:
    """Run the trials that are not over, and wait; returns how all trials stand, and why the sweep
    was stopped, empty if it was not.

    SIGTERM and Ctrl-C end it early, with a checkpoint of each trial. Raises `ConfigError` if the
    sweep's folder holds runs with other settings, `RunInUse` if another process that is alive runs
    the sweep, `GanscaleError` if Tune itself fails.
    """
    sweep = replace(sweep, base=resolve_config(sweep.base, console))
    with _held(sweep, console):
        return _run(sweep, console)


@contextmanager
def _held(sweep: Sweep, console: Console) -> Iterator[None]:
    """Let this process alone run the sweep while the block runs: each trial takes its run over from
    whoever has it, so two sweeps at once would end each other's trials."""
    # Starts are claimed like attempts at a run. The folder holds claims and no checkpoints.
    store, holder = CheckpointStore(sweep.root / "starts"), Holder.here(sweep.root)
    newest = store.newest_attempt()
    if newest is not None and newest.holder is not None:
        report = partial(console.print, highlight=False, soft_wrap=True)
        if newest.holder.is_alive(store.backend, report):
            raise RunInUse(
                f"the sweep in {sweep.root} is in use by {newest.holder}: wait for its end or stop "
                "it"
            )
    session = Session(holder, newest.number if newest else 0)
    with Heartbeat(store.backend, holder):
        store.claim(lambda: None, session=session)
        yield


def _run(sweep: Sweep, console: Console) -> tuple[list[TrialStatus], str]:
    statuses = [read_status(sweep, trial) for trial in sweep.trials()]
    if all(status.is_over for status in statuses):
        return statuses, ""
    stop, launch = StopRequest(), sweep.base.launch
    for name, value in _TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # In this order: Ray replaces the handlers of signals when it starts.
    with (
        cluster(launch.ray_address) as is_joined,
        stopping_on_signals(stop, launch.grace_seconds),
        displayed(sweep, statuses, console) as report,
    ):
        if not is_joined:
            require_capacity(sweep.base)
        while not _Experiment(sweep, statuses, stop, report).run():
            pass
    return statuses, stop.reason


class _Experiment(tune.Callback, tune.Stopper):  # type: ignore[misc]
    """Tune runs the trials that are neither over nor failed, and tells this object of it."""

    def __init__(
        self,
        sweep: Sweep,
        statuses: list[TrialStatus],
        stop: StopRequest,
        report: Callable[[TrialStatus], None],
    ) -> None:
        self._sweep, self._stop, self._report = sweep, stop, report
        self._statuses = {status.name: status for status in statuses}
        self._trials = [s for s in statuses if not s.is_over and s.state != "failed"]
        self._behind = min(status.kimg for status in self._trials)
        self._is_population = isinstance(sweep.file.scheduler, Population)
        given = for_workers()
        actor = start_driver_actor(sweep.root, {**given, NAMES_VARIABLE: ",".join(given)})
        self._messages = Messages(actor, secrets.token_hex(8))
        self._scheduler = self._make_scheduler()

    def run(self) -> bool:
        """Returns False if trials are left for another experiment: Tune would let a population wait
        for ever for a member that has failed, so the others go on without it."""
        sweep, launch, folder = self._sweep, self._sweep.base.launch, self._sweep.root / "ray"
        resources = {"cpu": launch.cpus_per_worker, "gpu": float(launch.use_gpu)}
        limit = sweep.file.max_concurrent
        if launch.max_workers > 1:
            # Groups of workers reserve their own places, and Tune wants a trial to take something.
            # A population has no limit, as Tune would count the trials that wait for others.
            resources, room = {"memory": 1.0}, num_workers_fitting(sweep.base) // launch.min_workers
            limit = None if self._is_population else limit or max(1, room)
        env = {"WANDB_RUN_GROUP": sweep.file.name, **variables()}
        trainable = tune.with_parameters(SweepTrial, sweep=sweep, messages=self._messages, env=env)
        trials = [{"name": s.name, "values": s.values, "kimg": s.kimg} for s in self._trials]
        for trial in trials if self._is_population else ():
            trial["kimg"] = self._behind  # for a round that some have reached and not all
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            param_space={"trial": tune.grid_search(trials)},
            tune_config=tune.TuneConfig(
                scheduler=self._scheduler,
                max_concurrent_trials=limit,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.config["trial"]["name"],
                trial_dirname_creator=str,
            ),
            run_config=tune.RunConfig(
                name=self._messages.group,
                storage_path=str(folder),
                stop=self,
                callbacks=[self],
                failure_config=tune.FailureConfig(max_failures=launch.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except Exception as error:
            raise GanscaleError(f"Ray Tune: {' '.join(str(error).split())[-300:]}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        left = [s for s in self._trials if not s.is_over and s.state != "failed"]
        for status in left:
            status.state = "interrupted" if status.kimg else "waiting"
        return not left or bool(self._stop.reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return (object, ())  # Tune pickles it into a file that is never read here

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether a result ends its trial: in halving, one that is not finite."""
        return isinstance(self._sweep.file.scheduler, Asha) and math.isnan(result["score"])

    def stop_all(self) -> bool:
        """Whether to end; by then all trials that were training have written a checkpoint."""
        has_lost_member = self._is_population and any(s.state == "failed" for s in self._trials)
        if not (self._stop.reason or has_lost_member):
            return False
        # Tune kills a trial that takes some seconds to end, so it hears of the stop last. Its loop
        # waits here meanwhile, and starts no trial that has been waiting for room.
        self._messages.put("stop", True)
        deadline = time.monotonic() + self._sweep.base.launch.grace_seconds
        running = [status for status in self._trials if status.state == "running"]
        while any(self._messages.get(s.name) for s in running) and time.monotonic() < deadline:
            time.sleep(0.1)
        return True

    def on_trial_start(self, trial: Any, **_: Any) -> None:
        self._statuses[str(trial)].state = "running"
        if not self._is_population:
            _repeat(self._scheduler, trial, self._statuses[str(trial)])

    def on_trial_result(self, trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A result, after the scheduler has decided: `done` without a state is a stop."""
        status = self._statuses[str(trial)]
        status.state = result["state"] or ("stopped" if result["done"] else "running")
        status.message = result["message"]
        if status.state not in ("failed", "interrupted"):
            status.kimg = result["kimg"]
            status.score = result["score"] if math.isfinite(result["score"]) else None
        if status.state == "stopped":
            with closing(EventLog(RunDirectory(self._sweep.root / status.name).events)) as log:
                log.write("sweep_stop", kimg=status.kimg, score=status.score)
        self._report(status)

    def on_trial_save(self, trial: Any, **_: Any) -> None:
        """The trial waits for the others of its population."""
        self._statuses[str(trial)].state = "paused"

    def on_trial_error(self, trial: Any, **_: Any) -> None:
        """The trial's process has failed more often than it may."""
        status = self._statuses[str(trial)]
        error = Path(trial.error_file).read_text(encoding="utf-8")
        status.state, status.message = "failed", error.strip().splitlines()[-1]
        self._report(status)

    def on_step_end(self, trials: list[Any], **_: Any) -> None:
        """Make the copies of a population. Its scheduler has just given a trial the configuration
        of the one that it is to copy; no trial trains, and none is started meanwhile."""
        for trial in trials:
            settings, target = trial.config["trial"], self._statuses[str(trial)]
            if settings["name"] != target.name:
                source = self._statuses[settings["name"]]
                copy_trial(self._sweep, source, target, settings["values"])
                trial.set_config({"trial": {**settings, "name": target.name}})

    def _make_scheduler(self) -> schedulers.TrialScheduler:
        """Halving compares with trials that are over, too; a population has no round twice."""
        sweep, settings = self._sweep, self._sweep.file.scheduler
        compared = {"time_attr": "nimg", "metric": "score", "mode": sweep.file.mode}
        if isinstance(settings, Asha):
            asha = schedulers.ASHAScheduler(
                **compared,
                max_t=round(1000 * sweep.base.training.total_kimg),
                grace_period=round(1000 * settings.grace_kimg),
                reduction_factor=settings.reduction,
            )
            for status in self._statuses.values():
                if status.is_over:
                    _repeat(asha, SimpleNamespace(trial_id=status.name), status)
            return asha
        if not isinstance(settings, Population):
            return schedulers.FIFOScheduler()
        behind, interval = round(1000 * self._behind), round(1000 * settings.interval_kimg)
        generator = generator_for(sweep.file.seed, "explore", behind)

        def explore(config: dict[str, Any]) -> dict[str, Any]:
            trial = config["trial"]
            return {"trial": {**trial, "values": sweep.explored(trial["values"], generator)}}

        return schedulers.PopulationBasedTraining(
            **compared,
            perturbation_interval=interval,
            burn_in_period=(behind // interval + 1) * interval,
            quantile_fraction=settings.quantile,
            custom_explore_fn=explore,  # Tune's own knows neither bounds nor whole numbers
            log_config=False,
            synch=True,  # metrics of GANs at different positions do not compare
        )


def _repeat(scheduler: schedulers.TrialScheduler, trial: Any, status: TrialStatus) -> None:
    """Tell halving what a trial has reported before; what it decided then stays decided."""
    scheduler.on_trial_add(None, trial)
    for kimg, score in status.known:
        if score is not None:
            scheduler.on_trial_result(None, trial, {"nimg": round(1000 * kimg), "score": score})
