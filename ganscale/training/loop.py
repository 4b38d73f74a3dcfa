"""The training loop: what is due, done?, step. It knows nothing of Ray.

What happens when is a function of the position alone, but for checkpoints and stops, which change
nothing that is computed. So a run that was killed and resumed does what the uninterrupted one does,
bit for bit at the same world size.
"""

from __future__ import annotations

import math
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

import torch
from torch import distributed as dist

from ganscale.checkpoint import Session
from ganscale.config import Config, SemiSupervisedMethod
from ganscale.data.shards import ShardSet
from ganscale.errors import CheckpointError, ConfigError, TrainingFault
from ganscale.tracking.sinks import Sink
from ganscale.tracking.step_times import StepTimes
from ganscale.tracking.workers import WorkerFigures, merged
from ganscale.training.build import (
    build_reader,
    build_state,
    check_against_shards,
    check_generator,
    load_shards,
)
from ganscale.training.distribute import gather_objects, sum_over_ranks
from ganscale.training.evaluating import Evaluator
from ganscale.training.guard import Alarm, Guard
from ganscale.training.inputs import HostInputs, InputPreparer
from ganscale.training.kernels import use_exact_kernels
from ganscale.training.labelled import LabelledPool
from ganscale.training.outputs import Outputs
from ganscale.training.precision import Precision
from ganscale.training.saving import Saving, non_finite
from ganscale.training.stopping import Agreement, Ending, StopRequest, Wishes
from ganscale.training.watchdog import Phase, Watchdog
from ganscale.world import World

__all__ = ["Trainer", "train"]

_MAX_SKIPS_NAMED = 100


def train(
    config: Config,
    world: World,
    stop: StopRequest | None = None,
    sinks: Sequence[Sink] = (),
    session: Session | None = None,
) -> Ending:
    """Train to `training.total_kimg`, going on from the newest checkpoint that verifies.

    Every rank calls this inside a process group. When any rank's `stop` is set, all finish the
    step, checkpoint and return. On rank 0 `sinks` hear what the run tells, and `session` says which
    process holds the run. Raises `ConfigError` or `DataError` before anything is written if the
    configuration cannot be trained, `RunInUse` if another process holds the run, `TrainingFault`
    when the guard ends the run, `Superseded` when a newer attempt has taken over.
    """
    shard_set = load_shards(config)
    check_against_shards(config, shard_set)
    check_generator(config, shard_set)
    if world.device == "cpu":
        torch.set_num_threads(config.launch.threads_per_worker)
    use_exact_kernels(world.torch_device)
    trainer = Trainer(config, world, shard_set, stop or StopRequest(), sinks, session)
    with warnings.catch_warnings():
        # Of gradients with a dimension of size 1, whose strides mean nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        try:
            return trainer.run()
        finally:
            trainer.close()


class Trainer:
    """One rank of a run."""

    def __init__(
        self,
        config: Config,
        world: World,
        shard_set: ShardSet,
        stop: StopRequest | None = None,
        sinks: Sequence[Sink] = (),
        session: Session | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.stop = stop or StopRequest()
        self.precision = Precision.resolve(config.training.precision, world.torch_device)
        self.saving = Saving(config, world, session)
        self._shards_digest = shard_set.digest
        self.values = shard_set.values
        self.outputs = Outputs(config, world, sinks, self.values, shard_set.classes)
        self._worker = WorkerFigures(world.torch_device)
        self.reader = build_reader(config, shard_set, world, gather_objects)
        self._labelled: LabelledPool | None = None
        if isinstance(config.method, SemiSupervisedMethod):
            self._labelled = LabelledPool(
                shard_set,
                self.reader.images,
                config.method.labels,
                seed=config.seed,
                device=world.torch_device,
            )
        self.watchdog = Watchdog(
            world,
            self.outputs.run_dir.stacks,
            stall_seconds=config.launch.stall_seconds,
            report=lambda **fields: self.outputs.event("stall", **fields),
            host=socket.gethostname(),
        )
        self.evaluator: Evaluator | None = None
        if config.evaluation.every_kimg:
            self.evaluator = Evaluator(config, shard_set, world)
        self._agreement = Agreement()
        self._begin("resume")

    def run(self) -> Ending:
        """The loop, to the end of the run or to a stop."""
        with self.watchdog:
            while True:
                batches = self.reader.batches(self.state.nimg, self.config.training.batch_size)
                with closing(
                    self.inputs.ahead(batches, self.state.nimg, self.state.step)
                ) as inputs:
                    outcome = self._follow(inputs)
                if isinstance(outcome, Ending):
                    return outcome
                self._roll_back(outcome)

    def step(self, host: HostInputs) -> None:
        """One step of the method on a global batch, and the averages after it."""
        state, size = self.state, self.config.training.batch_size
        self._times.enter("prepare")
        self._skipped += [str(error) for error in host.batch.skipped]
        inputs = self.inputs.to_device(host)
        state.method.set_betas(host.context)
        statistics = state.method.step(inputs, host.variant, self._mark)
        self._times.enter("average")
        state.means.add({f"train/{name}": value for name, value in statistics.items()})
        state.nimg += size
        state.step += 1
        if host.variant.generator_turn:
            for name, ema in state.emas.items():
                ema.update(state.averaged, inputs.schedules[f"ema_weight/{name}"])
        state.means.num_steps += 1
        self._times.num_steps += 1

    def close(self) -> None:
        """Close files and W&B; a checkpoint that is being written may become whole."""
        self.saving.close()
        self.outputs.close()

    def _follow(self, batches: Iterator[HostInputs]) -> Ending | Alarm:
        """Step after step, to the end, a stop, or an alarm that asks for a rollback."""
        while True:
            wishes = self._agreement.result()
            done = self.state.nimg >= self.config.total_nimg
            self._mark("write")
            alarm = self._write_what_is_due(wishes, done=done)
            if alarm is not None:
                return alarm
            if done or wishes.stop:
                return self._end("" if done else wishes.stop)
            self._agreement.propose(Wishes(self.stop.reason, checkpoint=self.saving.is_due()))
            self._mark("data")
            self.step(next(batches))

    def _begin(self, reason: Literal["resume", "rollback"], up_to: int | None = None) -> None:
        """Begin an attempt, from the newest checkpoint or from nothing."""
        self.state = build_state(self.config, self.precision, self.world)
        self.guard = Guard(
            self.config.objective.name,
            players=self.state.method.models,
            scaled=self.precision.name == "fp16",
        )
        self._skipped: list[str] = []
        self._measured: dict[str, float] = {}
        self._unlogged: dict[str, float] = {}
        self._best = math.inf
        accept = non_finite if reason == "rollback" else lambda _: None
        saved = self.saving.begin(reason, up_to, accept)
        if saved is not None:
            try:
                self._load_state_dict(saved)
            except KeyError as error:
                raise CheckpointError(
                    f"the newest checkpoint of {self.outputs.run_dir.root} has no {error}: it is "
                    "of another version of ganscale, which can go on with it"
                ) from None
        self._began_at = self.state.nimg if saved is not None else -1
        self.inputs = InputPreparer(
            self.config,
            self.world,
            self.state.method,
            values=self.values,
            num_rollbacks=self.saving.attempt.salt,
            labelled=self._labelled,
        )
        session = self.saving.session
        self.outputs.open(
            self.saving.attempt,
            self.state,
            self.precision.name,
            copied_from="" if session is None else session.copied_from,
        )
        self._clock = time.perf_counter()
        self._times = StepTimes(self.world.torch_device)

    def _mark(self, phase: Phase) -> None:
        """The next part of a step begins."""
        self.watchdog.mark(self.state.step, phase)
        self._times.enter("data_wait" if phase == "data" else phase.replace(" ", "_"))

    def _state_dict(self) -> dict[str, Any]:
        """Everything to go on from, with what each rank has not logged yet."""
        mine = {"means": self.state.means.state_dict(), "skipped": self._skipped}
        return {
            **self.state.state_dict(),
            "guard": self.guard.state_dict(),
            "measured": dict(self._measured),
            "unlogged": dict(self._unlogged),
            "best": self._best,
            "shards": self._shards_digest,
            "ranks": gather_objects(mine),
        }

    def _load_state_dict(self, saved: dict[str, Any]) -> None:
        world, ranks = self.world, saved["ranks"]
        if saved["shards"] != self._shards_digest:
            raise ConfigError(
                f"{self.config.data.shards} is not the shard set that this run was trained on: "
                "choose another name=..., or give it the shards that it had (data.shards)"
            )
        self.state.load_state_dict(saved)
        self.guard.load_state_dict(saved["guard"])
        self._measured, self._unlogged = dict(saved["measured"]), dict(saved["unlogged"])
        self._best = saved["best"]
        self.state.means.load_state_dict(
            [rank["means"] for rank in ranks], world.rank, world.world_size
        )
        if world.is_main:
            self._skipped = [text for rank in ranks for text in rank["skipped"]]

    def _write_what_is_due(self, wishes: Wishes, *, done: bool) -> Alarm | None:
        """Samples, a row, snapshots, a checkpoint; an alarm if the row asks for a rollback."""
        self._report_checkpoints()
        config, nimg = self.config, self.state.nimg
        if nimg == self._began_at:
            return None
        if done or nimg == 0 or self._due(config.samples.every_kimg):
            self._draw_samples()
        evaluation = config.evaluation
        if evaluation.every_kimg and nimg and (done or self._due(evaluation.every_kimg)):
            self._evaluate()
        if self.state.means.num_steps and (done or self._due(config.tracking.log_every_kimg)):
            alarm = self._judge(self._log_row())
            if alarm is not None:
                return alarm
        if self.world.is_main and (
            done or (nimg and self._due(config.checkpoint.snapshot_every_kimg))
        ):
            self.saving.check_current()
            self.outputs.save_snapshots(self.state)
        wanted = wishes.checkpoint or bool(wishes.stop) or done or nimg == 0
        if wanted or self._due(config.checkpoint.every_kimg):
            self.saving.save(
                self.state.nimg,
                self._state_dict(),
                step=self.state.step,
                metrics=self._measured,
                healthy_nimg=self.guard.healthy_nimg(nimg),
            )
        return None

    def _due(self, every_kimg: float) -> bool:
        """Whether the last step crossed a multiple of `every_kimg`."""
        nimg, every = self.state.nimg, 1000 * every_kimg
        return nimg // every > (nimg - self.config.training.batch_size) // every

    def _log_row(self) -> dict[str, float]:
        state, steps = self.state, self._times.num_steps
        means = state.means.averages(sum_over_ranks, self.world.world_size)
        seconds = time.perf_counter() - self._clock
        self._clock = time.perf_counter()
        row: dict[str, float] = {"step": state.step, "nimg": state.nimg, **means, **self._unlogged}
        for letter, model in state.method.models.items():
            row[f"train/loss_scale_{letter}"] = model.scaler.scale
            row[f"train/skips_{letter}"] = int(model.num_skips)
        row |= {
            f"train/{name}": value for name, value in state.method.extra_metrics(state.nimg).items()
        }
        row |= merged(gather_objects(self._worker.measure(self._times.means())))
        row["time/images_per_second"] = steps * self.config.training.batch_size / seconds
        if self.config.data.on_error == "skip":
            row["data/num_skipped"] = self._report_skipped()
        if self.world.device != "cpu":
            row["gpu/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.outputs.row(row)
        self._unlogged.clear()
        return row

    def _judge(self, row: dict[str, float]) -> Alarm | None:
        """Tell of what the guard sees; returns the alarm that asks for a rollback.

        Rows are the same on all ranks, so all come to the same verdict. Raises `TrainingFault`.
        """
        guard, salt = self.config.guard, self.saving.attempt.salt
        alarms = self.guard.look(row)
        policy = guard.policy
        if policy == "rollback" and salt >= guard.max_rollbacks:
            policy = "stop"
        for alarm in alarms:
            self.outputs.event(
                "alarm",
                message=alarm.message,
                kind=alarm.kind,
                nimg=self.state.nimg,
                step=self.state.step,
                healthy_nimg=alarm.healthy_nimg,
                action=policy,
            )
        if not alarms or policy == "warn":
            return None
        first = min(alarms, key=lambda alarm: alarm.healthy_nimg)
        if policy == "stop":
            rollbacks = f" after {salt} rollbacks" if salt else ""
            raise TrainingFault(
                f"stopped at {self.state.nimg / 1000:g} kimg{rollbacks}: {first.message}. The last "
                f"healthy position is {first.healthy_nimg / 1000:g} kimg (guard.policy)"
            )
        return first

    def _roll_back(self, alarm: Alarm) -> None:
        """Go on from the last healthy checkpoint, with other latents than the first time."""
        self._report_checkpoints(wait=True)
        self._begin("rollback", up_to=alarm.healthy_nimg)

    def _report_skipped(self) -> int:
        """Tell of the damaged samples that were left out since the last row, on any rank."""
        skipped = [text for texts in gather_objects(self._skipped) for text in texts]
        self._skipped.clear()
        if skipped:
            self.outputs.event(
                "skip",
                nimg=self.state.nimg,
                num_skipped=len(skipped),
                samples=sorted(skipped)[:_MAX_SKIPS_NAMED],
            )
        return len(skipped)

    def _draw_samples(self) -> None:
        """Rank 0 draws; what it measures on the images goes into the next row of all ranks."""
        began = time.perf_counter()
        measured: list[float | None] = [None]
        if self.world.is_main:
            self.saving.check_current()
            measured = [self.outputs.draw_samples(self.state)]
        dist.broadcast_object_list(measured, src=0)
        if measured[0] is not None:
            self._measured["metrics/diversity"] = measured[0]
            self._unlogged["metrics/diversity"] = measured[0]
        self._clock += time.perf_counter() - began  # images per second are those of training

    def _evaluate(self) -> None:
        """Measure the averaged generator; the figures go into the next row."""
        assert self.evaluator is not None
        began = time.perf_counter()
        self._mark("evaluation")
        measured = self.evaluator.measure(
            self.state.generator, self.state.nimg, alive=self.watchdog.alive
        )
        self._mark("write")
        self._unlogged |= measured.row
        if measured.problem:
            self.outputs.event("evaluation_failed", message=measured.problem, nimg=self.state.nimg)
        else:
            self.outputs.event("evaluation", nimg=self.state.nimg, skipped=measured.skipped)
        if measured.fid is not None:
            self._measured["fid"] = measured.fid
            if measured.fid < self._best:
                self._best = measured.fid
                self.saving.check_current()
                self.outputs.save_best(self.state)
        self._clock += time.perf_counter() - began  # images per second are those of training

    def _report_checkpoints(self, *, wait: bool = False) -> None:
        """Tell what became of checkpoints; `wait` for the one in flight."""
        for outcome in self.saving.finish() if wait else self.saving.outcomes():
            seconds = {
                "stall_seconds": round(outcome.stall_seconds, 3),
                "write_seconds": round(outcome.write_seconds, 3),
            }
            if outcome.name is not None:
                path = self.saving.where(outcome.name)
                self.outputs.event("checkpoint", nimg=outcome.nimg, path=path, **seconds)
            else:
                self.outputs.event(
                    "checkpoint_failed", message=outcome.problem, nimg=outcome.nimg, **seconds
                )

    def _end(self, reason: Any) -> Ending:
        """The last checkpoint is durable before the end is told."""
        self._report_checkpoints(wait=True)
        self.saving.require_durable(self.state.nimg)
        kind = "stop" if reason else "end"
        self.outputs.event(kind, nimg=self.state.nimg, step=self.state.step, reason=reason)
        return Ending(self.state.nimg, reason)
