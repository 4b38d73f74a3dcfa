"""A trial as Ray Tune runs it: an actor that trains a run and reports its rows.

It trains by the function that `ganscale train` calls, in a thread of the actor, or as a group of
Ray Train workers that this thread starts. What it reports it reads from the run's own files, so a
trial that was cut off reports first what its checkpoints hold, and trains only when Tune wants to
hear more. Tune's checkpoints of it hold nothing but the position that it has reported.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config
from ganscale.config.sweep import Sweep
from ganscale.errors import GanscaleError
from ganscale.launch.driver_actor import Messages
from ganscale.launch.local import train_here
from ganscale.launch.ray_metrics import RayMetrics
from ganscale.launch.ray_train import train_in_groups
from ganscale.launch.start import run_session, supervisor_of
from ganscale.run_directory import RunDirectory
from ganscale.tracking.console import stderr_console
from ganscale.tracking.history import History
from ganscale.tracking.logs import to_stderr
from ganscale.training.stopping import StopRequest, TrainResult
from ganscale.world import World

__all__ = ["GROUP_VARIABLE", "Surroundings", "TrialActor", "durable_reports", "reports", "value_of"]

GROUP_VARIABLE = "WANDB_RUN_GROUP"
_POLL_SECONDS = 0.2
_FID = re.compile(r"metrics/(fid|fd_(?!infinity|per_class)\w+)")


@dataclass(frozen=True)
class Surroundings:
    """What all trials of a sweep share."""

    sweep: Sweep
    messages: Messages
    """With the driver, which asks them to stop and hands out secrets."""
    variables: dict[str, str]
    """W&B's, of the driver's environment."""
    is_joined: bool
    """Whether the cluster was there before."""


def reports(
    sweep: Sweep, config: Config, *, after_kimg: float, first_attempt: int = 0
) -> list[tuple[float, float | None]]:
    """(kimg, metric) of a run's rows behind `after_kimg`, in order, of `first_attempt` and later.

    Positions are whole multiples of the distance between values, so that those of different trials
    can be compared, whatever the batch; the end of the run is the last.
    """
    every, end = sweep.every_kimg, config.training.total_kimg
    found: dict[float, float | None] = {}
    for row in History.read(RunDirectory(config.run_dir)).rows:
        column = value_of(sweep.file.metric, row)
        if column is not None and row["attempt"] >= first_attempt:
            kimg = round(row["nimg"] // round(1000 * every) * every, 6)
            found.setdefault(end if row["nimg"] >= config.total_nimg else kimg, row[column])
    return [(kimg, value) for kimg, value in sorted(found.items()) if kimg > after_kimg]


def durable_reports(
    sweep: Sweep, config: Config, *, after_kimg: float
) -> list[tuple[float, float | None]]:
    """Those that the run's checkpoints hold: nothing that is trained again replaces them."""
    store = CheckpointStore(config.checkpoints)
    reached = next((name.nimg for name in store.lineage() if store.verify(name) is None), -1)
    return [r for r in reports(sweep, config, after_kimg=after_kimg) if 1000 * r[0] <= reached]


def value_of(metric: str, row: Mapping[str, Any]) -> str | None:
    """The column of a row that has the metric; None if it was not measured."""
    if metric != "fid":
        return metric if metric in row else None
    return next((name for name in row if _FID.fullmatch(name)), None)


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """One trial, described by `{"trial": {"name": ..., "values": ..., "after_kimg": ...}}`."""

    def setup(self, config: dict[str, Any], surroundings: Surroundings) -> None:
        """Take up the trial, without training yet."""
        self._around, sweep = surroundings, surroundings.sweep
        self._training: _Training | None = None
        self._reports: list[tuple[float, float | None]] = []
        os.environ.update(surroundings.variables)
        os.environ.setdefault(GROUP_VARIABLE, sweep.file.name)
        os.environ.update(ray.get(surroundings.messages.actor.secrets.remote()))
        self._become(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, in the same process."""
        self.cleanup()
        self._become(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next value of the metric; starts to train when all are reported."""
        while True:
            if self._reports:
                return self._report(*self._reports.pop(0))
            training = self._begun()
            is_over = training.join(_POLL_SECONDS)
            if not is_over and self._around.messages.get("stop"):
                training.halt()
                is_over = True
            self._take_in(training, is_over=is_over)
            if is_over and not self._reports:
                return self._ended(training)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Stop training, with a checkpoint of ours that the trial goes on from."""
        self.cleanup()
        return {"reported": self._reported}

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on behind what was reported."""
        self._reported = checkpoint["reported"]
        self._reports = [report for report in self._reports if report[0] > self._reported]

    def cleanup(self) -> None:
        """Stop training; the checkpoint is durable when this returns."""
        if self._training is not None:
            self._training.halt()
            self._training = None

    def _become(self, config: dict[str, Any]) -> None:
        trial, sweep = config["trial"], self._around.sweep
        self._config = sweep.config(trial["name"], trial["values"])
        self._reported = float(trial["after_kimg"])
        self._reports = durable_reports(sweep, self._config, after_kimg=self._reported)

    def _begun(self) -> _Training:
        if self._training is None:
            self._training = _Training(self._config, is_joined=self._around.is_joined)
        return self._training

    def _take_in(self, training: _Training, *, is_over: bool) -> None:
        """Look for rows that the run has written since; its last one only when it has ended."""
        metrics = RunDirectory(self._config.run_dir).metrics
        size = metrics.stat().st_size if metrics.is_file() else 0
        if size == training.seen_bytes and not is_over:
            return
        training.seen_bytes = size
        end = self._config.training.total_kimg
        found = reports(
            self._around.sweep,
            self._config,
            after_kimg=self._reported,
            first_attempt=training.first_attempt,
        )
        self._reports = [(kimg, value) for kimg, value in found if kimg < end or is_over]

    def _report(self, kimg: float, value: float | None) -> dict[str, Any]:
        self._reported = kimg
        is_last = kimg >= self._config.training.total_kimg
        number = float("nan") if value is None else value
        state = "finished" if is_last else ""
        return {"kimg": kimg, "score": number, "done": is_last, "state": state, "message": ""}

    def _ended(self, training: _Training) -> dict[str, Any]:
        """What became of a run that reports nothing more."""
        outcome = training.outcome
        if isinstance(outcome, TrainResult) and outcome.reason:
            return {"done": True, "state": "interrupted", "message": ""}
        if isinstance(outcome, TrainResult):
            metric = self._around.sweep.file.metric
            message = f"no row of {self._config.run_dir}/metrics.jsonl has {metric} at the end"
            return {"done": True, "state": "failed", "message": message}
        if isinstance(outcome, GanscaleError):
            return {"done": True, "state": "failed", "message": str(outcome)}
        raise outcome


class _Training:
    """A run that trains in a thread of this process."""

    def __init__(self, config: Config, *, is_joined: bool) -> None:
        self.outcome: TrainResult | BaseException = TrainResult(0)
        self.seen_bytes = -1
        """Size of metrics.jsonl when it was last looked at."""
        attempts = CheckpointStore(config.checkpoints).attempts()
        self.first_attempt = 1 + max((attempt.number for attempt in attempts), default=0)
        self._config = config
        self._is_joined = is_joined
        self._stop = StopRequest()
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> bool:
        """Wait for the end for at most so long; returns whether it has come."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def halt(self) -> None:
        """Let it write a checkpoint and end."""
        self._stop.reason = "terminated"
        deadline = time.monotonic() + self._config.launch.grace_seconds
        if not self.join(max(0.0, deadline - time.monotonic())):
            self.outcome = GanscaleError(
                f"no end within {self._config.launch.grace_seconds:g} s (launch.grace_seconds)"
            )

    def _run(self) -> None:
        try:
            self.outcome = _train(self._config, self._stop, is_joined=self._is_joined)
        except BaseException as error:
            self.outcome = error


def _train(config: Config, stop: StopRequest, *, is_joined: bool) -> TrainResult:
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
        return train_in_groups(config, supervisor, stop, held, is_joined=is_joined)
