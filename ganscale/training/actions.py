"""The built-in callbacks: samples, evaluation, rows of metrics, snapshots, checkpoints.

All ranks run them at the same positions, as some are collectives; rank 0 alone writes files. Their
order matters and is that of `Trainer._make_actions`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed as dist

from ganscale.config import Config
from ganscale.errors import TrainingFault
from ganscale.tracking.stats import WorkerStats, worker_columns
from ganscale.tracking.step_times import StepTimes
from ganscale.training.callbacks import Callback, Rollback
from ganscale.training.checkpoints import CheckpointManager
from ganscale.training.collectives import gather_objects, sum_over_ranks
from ganscale.training.evaluator import Evaluator
from ganscale.training.guard import Guard
from ganscale.training.outputs import Outputs
from ganscale.training.state import TrainingState
from ganscale.training.watchdog import Phase, Watchdog

# An event is one line of a file, and a damaged set may have any number of bad samples.
_MAX_SKIPS_NAMED = 100


class DrawSamples(Callback):
    """Rank 0 draws a grid; the diversity of its images goes into the next row of all ranks."""

    at_start = True

    def __init__(self, config: Config, outputs: Outputs, checkpoints: CheckpointManager) -> None:
        self.every_kimg = config.samples.every_kimg
        self.outputs = outputs
        self.checkpoints = checkpoints

    def run(self, state: TrainingState) -> None:
        with state.not_training():
            diversity: list[float | None] = [None]
            if state.world.is_main:
                # A superseded process must not overwrite the pictures of the attempt that took
                # over.
                self.checkpoints.check_current()
                diversity = [self.outputs.draw_samples(state)]
            # The other ranks wait here, so the time is no training on any of them.
            dist.broadcast_object_list(diversity, src=0)
            if diversity[0] is not None:
                # The guard looks at the row on every rank and must come to the same verdict
                # everywhere, so all get what rank 0 has measured.
                state.latest_metrics["metrics/diversity"] = diversity[0]
                state.next_row["metrics/diversity"] = diversity[0]


class Evaluate(Callback):
    """Measures the averaged generator; the metrics go into the next row, and the best is kept.

    The settings of evaluations may change when a run is resumed. Distances that were not measured
    alike are not compared, so the best is then looked for anew.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        outputs: Outputs,
        checkpoints: CheckpointManager,
        watchdog: Watchdog,
        enter: Callable[[Phase], None],
    ) -> None:
        self.every_kimg = evaluator.config.evaluation.every_kimg
        self.evaluator = evaluator
        self.outputs = outputs
        self.checkpoints = checkpoints
        self.watchdog = watchdog
        self.enter = enter
        self.best_fid = math.inf

    def run(self, state: TrainingState) -> None:
        with state.not_training():
            self.enter("evaluation")
            measured = self.evaluator.measure(
                state.generator, state.nimg, alive=self.watchdog.alive
            )
            self.enter("write")
            state.next_row |= measured.row
            if measured.problem:
                self.outputs.event("evaluation_failed", message=measured.problem, nimg=state.nimg)
            else:
                self.outputs.event("evaluation", nimg=state.nimg, skipped=measured.skipped)
            # FID is not among the run's metrics, or could not be measured.
            if measured.fid is None:
                return
            state.latest_metrics[self.evaluator.measurement] = measured.fid
            if measured.fid < self.best_fid:
                # On all ranks alike: it is part of the state that every rank loads.
                self.best_fid = measured.fid
                self.checkpoints.check_current()
                self.outputs.save_best(state)

    def state_dict(self) -> dict[str, Any]:
        return {"best_fid": self.best_fid, "measurement": self.evaluator.measurement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Checkpoints of older versions do not say how it was measured.
        measurement = self.evaluator.measurement
        if state.get("measurement", measurement) == measurement:
            self.best_fid = state["best_fid"]


class LogMetrics(Callback):
    """Logs a row of metrics, and does what the guard's policy says where it raises an alarm."""

    def __init__(
        self, config: Config, guard: Guard, outputs: Outputs, times: StepTimes, num_rollbacks: int
    ) -> None:
        self.every_kimg = config.tracking.log_every_kimg
        self.config = config
        self.guard = guard
        self.outputs = outputs
        self.times = times
        self.num_rollbacks = num_rollbacks
        self._worker = WorkerStats(outputs.world.torch_device)
        self._last_time = time.perf_counter()

    def run(self, state: TrainingState) -> None:
        row = self._row(state)
        self.outputs.row(row)
        state.next_row.clear()
        self._check(row, state)

    def _row(self, state: TrainingState) -> dict[str, float]:
        # Taken before the times are read below, which starts them anew.
        num_steps = self.times.num_steps
        # This transfer waits for the device, so the clock that is read next tells the time of steps
        # that have been computed and not only launched.
        means = state.means.averages(sum_over_ranks, state.world.world_size)
        now = time.perf_counter()
        # Samples, evaluations and the like are no training; a run that evaluates often is not
        # slower.
        seconds = now - self._last_time - state.excluded_seconds
        self._last_time, state.excluded_seconds = now, 0.0
        row: dict[str, float] = {
            "step": state.step,
            "nimg": state.nimg,
            **means,
            **state.row_values(),
        }
        for letter, model in state.method.models.items():
            row[f"train/loss_scale_{letter}"] = model.scaler.scale
            row[f"train/skips_{letter}"] = int(model.num_skips)
        extra = state.method.extra_metrics(state.nimg)
        row |= {f"train/{name}": value for name, value in extra.items()}
        # A collective: all ranks log at the same position.
        row |= worker_columns(gather_objects(self._worker.measure(self.times.means())))
        row["time/images_per_second"] = num_steps * self.config.training.batch_size / seconds
        if self.config.data.on_error == "skip":
            row["data/num_skipped"] = self._report_skipped(state)
        if state.world.device != "cpu":
            row["gpu/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return row

    def _report_skipped(self, state: TrainingState) -> int:
        """Report the damaged samples that any rank has left out since the last row."""
        skipped = [text for texts in gather_objects(state.skipped_samples) for text in texts]
        state.skipped_samples.clear()
        if skipped:
            self.outputs.event(
                "skip",
                nimg=state.nimg,
                num_skipped=len(skipped),
                samples=sorted(skipped)[:_MAX_SKIPS_NAMED],
            )
        return len(skipped)

    def _check(self, row: Mapping[str, float], state: TrainingState) -> None:
        """Raise `Rollback` or `TrainingFault` if the guard raises an alarm and the policy says so.

        Rows are the same on all ranks, so all come to the same verdict.
        """
        alarms, settings = self.guard.look(row), self.config.guard
        policy = settings.policy
        # A run that fails again and again after going back would do so forever.
        if policy == "rollback" and self.num_rollbacks >= settings.max_rollbacks:
            policy = "stop"
        for alarm in alarms:
            self.outputs.event(
                "alarm",
                message=alarm.message,
                kind=alarm.kind,
                nimg=state.nimg,
                step=state.step,
                healthy_nimg=alarm.healthy_nimg,
                action=policy,
            )
        if not alarms or policy == "warn":
            return
        # The earliest of several causes: a checkpoint after it may hold it already.
        first = min(alarms, key=lambda alarm: alarm.healthy_nimg)
        if policy == "rollback":
            raise Rollback(first.healthy_nimg)
        rollbacks = f" after {self.num_rollbacks} rollbacks" if self.num_rollbacks else ""
        raise TrainingFault(
            f"stopped at {state.nimg / 1000:g} kimg{rollbacks}: {first.message}. The last "
            f"healthy position is {first.healthy_nimg / 1000:g} kimg (guard.policy)"
        )

    def state_dict(self) -> dict[str, Any]:
        return {**self.guard.state_dict(), "policy": self.config.guard.policy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.guard.load_state_dict(state)
        # An alarm is raised once. A run that is resumed with another policy is meant to do
        # something else about the one that is up.
        if state.get("policy") != self.config.guard.policy:
            self.guard.raise_again()


class SaveSnapshots(Callback):
    """Rank 0 writes the averaged networks, for inference."""

    def __init__(self, config: Config, outputs: Outputs, checkpoints: CheckpointManager) -> None:
        self.every_kimg = config.checkpoint.snapshot_every_kimg
        self.outputs = outputs
        self.checkpoints = checkpoints

    def run(self, state: TrainingState) -> None:
        # The averages are the same on all ranks, so nothing has to be gathered.
        if state.world.is_main:
            self.checkpoints.check_current()
            self.outputs.save_snapshots(state)


class SaveCheckpoint(Callback):
    """Saves all that a run needs to go on, in the background; also when a rank asks for it."""

    at_start = True

    def __init__(
        self,
        config: Config,
        checkpoints: CheckpointManager,
        guard: Guard,
        run_state: Callable[[], dict[str, Any]],
    ) -> None:
        self.every_kimg = config.checkpoint.every_kimg
        self.checkpoints = checkpoints
        self.guard = guard
        self.run_state = run_state

    def is_due(self, state: TrainingState) -> bool:
        # The clock and a stop ask for checkpoints at positions that another run would not have.
        # That is harmless: writing one changes nothing that is computed.
        return state.checkpoint_requested or state.stop_requested or super().is_due(state)

    def run(self, state: TrainingState) -> None:
        self.checkpoints.save(
            state.nimg,
            self.run_state(),
            step=state.step,
            metrics=state.latest_metrics,
            healthy_nimg=self.guard.healthy_nimg(state.nimg),
        )
