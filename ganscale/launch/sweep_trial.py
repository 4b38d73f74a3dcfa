"""A trial as Ray Tune runs it: an actor that trains a run and reports the rows with the metric.

Training runs in a thread of the actor, by the function that `ganscale train` calls, or in a group
of Ray Train workers that the thread starts; what is reported is read from the run's files. It is a
class and not a function, because Tune tells only a class that it is being stopped, and waits until
the run's checkpoint is durable.
"""

from __future__ import annotations

import math
import os
import threading
from contextlib import suppress
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError

from ganscale.atomic_files import write_text
from ganscale.config import Config
from ganscale.config.sweep import Population, Sweep
from ganscale.errors import GanscaleError
from ganscale.launch.driver_actor import Messages
from ganscale.launch.held_run import run_session
from ganscale.launch.local import train_here
from ganscale.launch.ray_metrics import RayMetrics
from ganscale.launch.ray_train import train_in_groups
from ganscale.launch.start import supervisor_of
from ganscale.launch.sweep_status import Reports, missing_metric, reports, resume_point
from ganscale.run_directory import RunDirectory
from ganscale.tracking.console import stderr_console
from ganscale.tracking.logs import to_stderr
from ganscale.training.stopping import StopRequest, TrainResult
from ganscale.world import World


class SweepTrial(tune.Trainable):  # type: ignore[misc]
    """One trial; its configuration is `{"trial": {"name": ..., "values": ..., "kimg": ...}}`.

    It reports what comes after `kimg`. Tune's checkpoints of it hold that position and nothing
    else, as the run has its own checkpoints.
    """

    def setup(self, config: Any, sweep: Sweep, messages: Messages, env: Any) -> None:
        """Take up a trial, without training yet.

        In `messages` the sweep's process leaves `stop`, and a trial True under its name while it
        trains; `env` is for this process's environment.
        """
        self._sweep, self._messages = sweep, messages
        self._thread: threading.Thread | None = None
        os.environ.update({**env, **ray.get(messages.actor.secrets.remote())})
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, or the same one with other values, in the same process."""
        self.cleanup()
        trial = new_config["trial"]
        self._config = self._sweep.config(trial["name"], trial["values"])
        self._run_dir = RunDirectory(self._config.run_dir)
        self._reported = trial["kimg"]
        if isinstance(self._sweep.file.scheduler, Population) and self._run_dir.config.is_file():
            # A run is resumed with the settings that it has, and those of a population change.
            write_text(self._run_dir.config, self._config.to_yaml())
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next report, or for the end of the run."""
        if self._thread is None:
            self._stop, self._resume_point = StopRequest(), resume_point(self._config)
            self._error: BaseException | None = None
            self._is_done, self._read_bytes = False, -1
            self._reports: Reports = []
            self._thread = threading.Thread(target=self._train, name="training", daemon=True)
            self._thread.start()
        while True:
            self._thread.join(0.2)
            if self._messages.get("stop"):
                self._stop.reason = "terminated"
            is_over = not self._thread.is_alive()
            size = self._run_dir.metrics.stat().st_size if self._run_dir.metrics.is_file() else 0
            if size != self._read_bytes:  # the file of a long run is large
                self._reports = reports(self._sweep, self._config, *self._resume_point)
                self._read_bytes = size
                if not self._reports and self._error is None:
                    problem = missing_metric(self._sweep, self._config, *self._resume_point)
                    if problem:  # now, and not after days of training that nobody can compare
                        self._error = GanscaleError(problem)
                        self._stop.reason = "terminated"
            for kimg, score in self._reports:
                is_last = kimg >= self._config.training.total_kimg
                # The last one waits for the final checkpoint.
                if kimg > self._reported and (self._is_done or not is_last):
                    self._reported = kimg
                    return self._result("finished" if is_last else "", score)
            if is_over and self._is_done:
                file, metric = self._run_dir.metrics, self._sweep.file.metric
                self._error = GanscaleError(f"no row of {file} has {metric} at the end")
            if is_over and isinstance(self._error, GanscaleError):
                # It would recur, so Tune is not to start the trial again.
                return self._result("failed", message=str(self._error))
            if is_over and self._error is not None:
                raise self._error
            if is_over:
                return self._result("interrupted")

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Stop training, with a checkpoint of the run that the trial goes on from."""
        self.cleanup()
        return {"kimg": self._reported}

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on behind what was reported, by this trial or by the one that it has copied."""
        self._reported = checkpoint["kimg"]

    def cleanup(self) -> None:
        """Stop training; the run's checkpoint is durable when this returns."""
        if self._thread is not None:
            self._stop.reason = "terminated"
            self._thread.join(self._config.launch.grace_seconds)
            if self._thread.is_alive():
                os._exit(1)  # Tune starts the trial again, from its newest checkpoint
            self._thread = None

    def _result(self, state: str, score: float | None = None, message: str = "") -> dict[str, Any]:
        """What Tune hears; its schedulers compare `score` at `nimg`."""
        file, nimg = self._sweep.file, round(1000 * self._reported)
        if score is None:
            # A population would leave out a trial without a number instead of replacing it, and
            # ASHA's percentiles do not survive an infinity.
            worst = math.inf if file.mode == "min" else -math.inf
            score = worst if isinstance(file.scheduler, Population) else math.nan
        outcome = {"done": bool(state), "state": state, "message": message}
        return {"nimg": nimg, "kimg": self._reported, "score": score, **outcome}

    def _train(self) -> None:
        name = self._config.name
        try:
            # In this order: whoever asks all trials to stop and then looks who trains misses none.
            self._messages.put(name, True)
            if not self._messages.get("stop"):
                self._is_done = not _train(self._config, self._stop).reason
        except BaseException as error:
            self._error = error
        with suppress(RayError):  # the sweep's process is gone, and this one will be
            self._messages.put(name, False)


def _train(config: Config, stop: StopRequest) -> TrainResult:
    console = stderr_console()
    # Tune runs each trial once; an actor that it has given up must not keep the next one out.
    with run_session(config, console, take_over=True) as held:
        assert held is not None  # this process is no rank of torchrun
        if config.launch.max_workers == 1:
            world = World.detect("cuda" if config.launch.use_gpu else "cpu")
            to_stderr(config.name, world.rank)
            sinks = [RayMetrics(config.name, config.total_nimg)]
            return train_here(config, world, stop, sinks, held.session)
        supervisor = supervisor_of(config, held, console)
        # Whether there is room at all has been found out when the sweep began.
        return train_in_groups(config, supervisor, stop, held, is_joined=True)
