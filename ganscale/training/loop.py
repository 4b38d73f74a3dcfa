"""The training loop: what is due, done?, step, average. It knows nothing of Ray.

What happens when is a function of the position alone, but for checkpoints and stops, which change
nothing that is computed. So a run that was killed and resumed does what the uninterrupted one does,
bit for bit at the same world size.
"""

from __future__ import annotations

import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

import torch

from ganscale.checkpoint import Session
from ganscale.config import Config, SemiSupervisedMethod
from ganscale.data.shards import ShardSet
from ganscale.errors import CheckpointError, ConfigError, GanscaleError, TrainingFault
from ganscale.tracking.sinks import Sink
from ganscale.tracking.step_times import StepTimes
from ganscale.training.actions import (
    DrawSamples,
    Evaluate,
    LogMetrics,
    SaveCheckpoint,
    SaveSnapshots,
)
from ganscale.training.build import (
    build_reader,
    build_state,
    check_against_shards,
    check_generator,
    load_shards,
)
from ganscale.training.callbacks import Callback, Rollback
from ganscale.training.checkpoints import CheckpointManager, non_finite
from ganscale.training.collectives import gather_objects
from ganscale.training.compilation import kernel_compiler
from ganscale.training.determinism import restoring_settings, use_deterministic_kernels
from ganscale.training.evaluator import Evaluator
from ganscale.training.guard import Guard
from ganscale.training.inputs import HostInputs, InputPreparer, PackedInputs
from ganscale.training.labelled import LabelledPool
from ganscale.training.memory import device_memory_gib, out_of_memory_message
from ganscale.training.outputs import Outputs
from ganscale.training.precision import Precision
from ganscale.training.step_graphs import StepRunner, choose_capture, own_stream
from ganscale.training.step_inputs import StepVariant
from ganscale.training.stop_consensus import RankRequests, StopConsensus
from ganscale.training.stopping import StopReason, StopRequest, TrainResult
from ganscale.training.watchdog import Phase, Watchdog
from ganscale.world import World


def train(
    config: Config,
    world: World,
    stop: StopRequest | None = None,
    sinks: Sequence[Sink] = (),
    session: Session | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train to `training.total_kimg`, going on from the newest checkpoint that verifies.

    Every rank calls this inside a process group. When any rank's `stop` is set, all finish the
    step, checkpoint and return. On rank 0 `sinks` get the run's rows and events, and `session` says
    which process holds the run. `callbacks` are run between steps, on all ranks, after samples and
    evaluation and before the row of metrics. Raises `ConfigError` or `DataError` before anything is
    written if the configuration cannot be trained, `RunInUse` if another process holds the run,
    `TrainingFault` when the guard ends the run or a rollback too many is asked for, `Superseded`
    when a newer attempt has taken over, and `GanscaleError` if a step does not fit into memory.
    """
    _check_callbacks(callbacks)
    shard_set = load_shards(config)
    # What the set rules out is refused before a file of the run is touched.
    check_against_shards(config, shard_set)
    check_generator(config, shard_set)
    with restoring_settings(), warnings.catch_warnings(), own_stream(world.torch_device):
        # On the CPU the ranks of one machine share its cores, and torch by default takes all of
        # them for each process.
        if world.device == "cpu":
            torch.set_num_threads(config.launch.threads_per_worker)
        use_deterministic_kernels(world.torch_device)
        # Of gradients with a dimension of size 1, whose strides mean nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        trainer = Trainer(config, world, shard_set, stop, sinks, session, callbacks)
        try:
            return trainer.run()
        finally:
            trainer.close()


def _check_callbacks(callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        if not callback.every_kimg > 0:
            raise ConfigError(
                f"{type(callback).__name__}.every_kimg is {callback.every_kimg!r}: a distance must "
                "be above 0; 0.001 is after each step"
            )


class Trainer:
    """One rank of a run: it owns the state, the reader, the outputs and the loop over them."""

    def __init__(
        self,
        config: Config,
        world: World,
        shard_set: ShardSet,
        stop: StopRequest | None = None,
        sinks: Sequence[Sink] = (),
        session: Session | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.world = world
        self.shard_set = shard_set
        self.stop = stop or StopRequest()
        self.callbacks = callbacks
        self.checkpoints = CheckpointManager(config, world, session)
        self.outputs = Outputs(
            config, world, sinks, shard_set.values, shard_set.classes, shard_set.class_counts
        )
        self.reader = build_reader(config, shard_set, world, gather_objects)
        self.labelled: LabelledPool | None = None
        if isinstance(config.method, SemiSupervisedMethod):
            self.labelled = LabelledPool(
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
        # Made once for the run, not once an attempt: it loads an extractor and caches the features
        # of the reference. A missing extractor or reference is refused here, before the start.
        self.evaluator: Evaluator | None = None
        if config.evaluation.every_kimg:
            self.evaluator = Evaluator(config, shard_set, world)
            if config.checkpoint.best_metric == "fid":
                self.checkpoints.best_metric = self.evaluator.measurement
        self._begin("resume")

    def run(self) -> TrainResult:
        """Train to the end of the run or to a stop; a `Rollback` begins again at a checkpoint."""
        with self.watchdog:
            while True:
                state, size = self.state, self.config.training.batch_size
                batches = self.reader.batches(state.nimg, size)
                try:
                    # Closed before a rollback begins: its threads prepare inputs with the old
                    # random numbers from the old position.
                    with closing(self.inputs.ahead(batches, state.nimg, state.step)) as inputs:
                        return self._train(inputs)
                except Rollback as rollback:
                    self._check_rollbacks(rollback)
                    # The checkpoint in flight may be the one to go back to.
                    self._report_checkpoints(wait=True)
                    self._begin("rollback", up_to=rollback.healthy_nimg)

    def _train(self, inputs: Iterator[HostInputs]) -> TrainResult:
        """The loop: samples, evaluation, callbacks, row, snapshots, checkpoint, done?, step."""
        state, consensus = self.state, StopConsensus()
        while True:
            # What the ranks proposed before the last step. It was on its way during that step, so
            # nobody waits for it here, and all act on it at the same position.
            requests = consensus.result()
            state.done = state.nimg >= self.config.total_nimg
            # A run that is asked to stop leaves a checkpoint at the very position that it stops at.
            state.checkpoint_requested = requests.checkpoint or bool(requests.stop)
            self._enter("write")
            self._report_checkpoints()
            # At the position of the checkpoint that it begins with all is done already.
            if state.nimg != self.checkpoints.start_nimg:
                for action in self.actions:
                    if action.is_due(state):
                        action.run(state)
            # After the actions: the end of the run is sampled, logged and saved, a stop is saved.
            stop: StopReason = "callback" if state.stop_requested else requests.stop
            if state.done or stop:
                return self._finish("" if state.done else stop)
            consensus.propose(RankRequests(self.stop.reason, self.checkpoints.is_due()))
            self._enter("data")
            self.step(next(inputs))

    def step(self, host: HostInputs) -> None:
        """One step of the method on a global batch, and the averages after it."""
        self.times.enter("prepare")
        # Noted by the rank that met them, on the host; ranks exchange them once a row.
        self.state.skipped_samples += [str(error) for error in host.batch.skipped]
        try:
            self.steps.run(host)
        except torch.OutOfMemoryError as error:
            # Of the configuration and not of this attempt: the next one would end like this.
            world = self.world
            message = out_of_memory_message(self.config, world.device, device_memory_gib(world))
            raise GanscaleError(message) from error
        self.state.advance(self.config.training.batch_size)
        self.times.num_steps += 1

    def _update(
        self, packed: PackedInputs, variant: StepVariant, enter: Callable[[Phase], None]
    ) -> None:
        """All that a step does on the device; from the same tensors it computes the same bits."""
        state = self.state
        inputs = self.inputs.unpack(packed)
        with self.kernels:
            statistics = state.method.step(inputs, variant, enter)
        enter("average")
        # Added up on the device: a loss is read by the host once a row and not once a step.
        state.means.add({f"train/{name}": value for name, value in statistics.items()})
        # What is averaged has not changed in the discriminator's other turns; the weight counts the
        # images of all of them (`InputPreparer._ema_weights`).
        if variant.generator_turn:
            for name, ema in state.emas.items():
                ema.update(state.averaged, inputs.schedules[f"ema_weight/{name}"])

    def _check_rollbacks(self, rollback: Rollback) -> None:
        """Raise `TrainingFault` if the run has gone back as often as it may.

        The guard stops asking by itself; callbacks would go back again and again.
        """
        limit = self.config.guard.max_rollbacks
        if self.checkpoints.num_rollbacks >= limit:
            raise TrainingFault(
                f"stopped at {self.state.nimg / 1000:g} kimg: a callback asks to go back to "
                f"{rollback.healthy_nimg / 1000:g} kimg, after {limit} rollbacks "
                "(guard.max_rollbacks)"
            )

    def close(self) -> None:
        """Close files and W&B; a checkpoint that is being written may become whole."""
        self.reader.close()
        self.checkpoints.close()
        self.outputs.close()

    def _begin(self, reason: Literal["resume", "rollback"], up_to: int | None = None) -> None:
        """Begin an attempt, from the newest checkpoint (at most at `up_to`) or from nothing."""
        # First, as it may refuse the configuration.
        graphs = self.config.training.cuda_graphs
        capture = choose_capture(graphs, self.world.torch_device)
        # A rollback, too, builds everything anew and then loads: no state can be left behind by
        # what went wrong.
        precision = Precision.resolve(self.config.training.precision, self.world.torch_device)
        self.state = build_state(self.config, precision, self.world)
        self.times = StepTimes(self.world.torch_device)
        # Resuming must take the newest checkpoint, whatever is in it, to be bit-identical. Going
        # back is about finding a good one, and weights may have gone bad before a row showed it.
        accept = non_finite if reason == "rollback" else lambda _: None
        saved = self.checkpoints.begin(reason, up_to, accept)
        # After the attempt has begun, which decides the number of rollbacks, and before the state
        # is loaded, of which the actions have a part.
        self.actions = self._make_actions(precision)
        if saved is not None:
            try:
                self._load_state_dict(saved)
            except KeyError as error:
                raise CheckpointError(
                    f"the newest checkpoint of {self.outputs.run_dir.root} has no {error}: it is "
                    "of another version of ganscale, which can go on with it"
                ) from error
            # Outside, as a user's own may raise a `KeyError` that says nothing of versions.
            for group, actions in self._named_actions().items():
                # In checkpoints of older versions callbacks are among the actions.
                states = saved.get(group, saved["actions"])
                for name, action in actions.items():
                    if name in states:  # a callback or an evaluation may be new to the run
                        action.load_state_dict(states[name])
            # When the checkpoint was saved the run was longer. It ends here now, so all that is
            # done at the end of a run is due.
            if self.state.nimg >= self.config.total_nimg and not self.state.done:
                self.checkpoints.forget_start()
        num_rollbacks = self.checkpoints.num_rollbacks
        self.inputs = InputPreparer(
            self.config,
            self.world,
            self.state.method,
            values=self.shard_set.values,
            num_rollbacks=num_rollbacks,
            labelled=self.labelled,
        )
        self.kernels = kernel_compiler(self.config, self.world.torch_device)
        self.steps = StepRunner(
            self._update,
            self.world.torch_device,
            enter=self._enter,
            capture=capture,
            must_capture=graphs == "on",
            recover=self.state.method.recover,
        )
        session = self.checkpoints.session
        # What is above may refuse the configuration, and the run must stay one that can be resumed.
        self.checkpoints.write_config()
        # Last: the event that opens the attempt tells the position that was loaded.
        self.outputs.open(
            self.checkpoints.attempt,
            self.state,
            precision.name,
            num_rollbacks=num_rollbacks,
            copied_from="" if session is None else session.copied_from,
        )

    def _make_actions(self, precision: Precision) -> list[Callback]:
        """What is done between steps, in its order.

        The row comes after all that measures, so that it holds what was measured at its position;
        a rollback comes before what it would undo is saved.
        """
        config, outputs, checkpoints = self.config, self.outputs, self.checkpoints
        guard = Guard(
            config.objective.name,
            models=self.state.method.models,
            scaled=precision.name == "fp16",
            discriminator_steps=config.training.discriminator_steps,
        )
        evaluate = []
        if self.evaluator is not None:
            evaluate = [Evaluate(self.evaluator, outputs, checkpoints, self.watchdog, self._enter)]
        return [
            DrawSamples(config, outputs, checkpoints),
            *evaluate,
            *self.callbacks,
            LogMetrics(config, guard, outputs, self.times, checkpoints.num_rollbacks),
            SaveSnapshots(config, outputs, checkpoints),
            SaveCheckpoint(config, checkpoints, guard, self._state_dict),
        ]

    def _enter(self, phase: Phase) -> None:
        self.watchdog.mark(self.state.step, phase)
        self.times.enter("data_wait" if phase == "data" else phase.replace(" ", "_"))

    def _state_dict(self) -> dict[str, Any]:
        """Everything to go on from, with what each rank has not logged yet; a collective."""
        return {
            **self.state.state_dict(),
            **{
                group: {name: action.state_dict() for name, action in actions.items()}
                for group, actions in self._named_actions().items()
            },
            "shards": self.shard_set.digest,
            # Each rank's sums since its last row; another number of workers shares them out when it
            # resumes.
            "ranks": gather_objects(self.state.rank_state_dict()),
        }

    def _load_state_dict(self, saved: dict[str, Any]) -> None:
        if saved["shards"] != self.shard_set.digest:
            raise ConfigError(
                f"{self.config.data.shards} is not the shard set that this run was trained on: "
                "choose another name=..., or give it the shards that it had (data.shards)"
            )
        self.state.load_state_dict(saved)
        self.state.load_rank_state_dicts(saved["ranks"])

    def _named_actions(self) -> dict[str, dict[str, Callback]]:
        """The built-in actions and the callbacks, by the names of their classes.

        They are numbered where a name comes again, in either group by itself: a callback may have
        the name of an action.
        """
        named: dict[str, dict[str, Callback]] = {"actions": {}, "callbacks": {}}
        seen: Counter[tuple[str, str]] = Counter()
        for action in self.actions:
            is_callback = any(action is callback for callback in self.callbacks)
            group, name = "callbacks" if is_callback else "actions", type(action).__name__
            number = seen[group, name]
            named[group][f"{name} {number}" if number else name] = action
            seen[group, name] += 1
        return named

    def _report_checkpoints(self, *, wait: bool = False) -> None:
        """Report which checkpoints were written or failed; `wait` for the one in flight."""
        results = self.checkpoints.finish() if wait else self.checkpoints.results()
        for result in results:
            seconds = {
                "stall_seconds": round(result.stall_seconds, 3),
                "write_seconds": round(result.write_seconds, 3),
            }
            if result.name is not None:
                path = self.checkpoints.where(result.name)
                self.outputs.event("checkpoint", nimg=result.nimg, path=path, **seconds)
            else:
                self.outputs.event(
                    "checkpoint_failed", message=result.problem, nimg=result.nimg, **seconds
                )

    def _finish(self, reason: StopReason) -> TrainResult:
        """Report the end when the last checkpoint is durable."""
        self._report_checkpoints(wait=True)
        # A run ends well only if what it ends with can be loaded again.
        self.checkpoints.raise_if_last_write_failed(self.state.nimg)
        kind = "stop" if reason else "end"
        self.outputs.event(kind, nimg=self.state.nimg, step=self.state.step, reason=reason)
        return TrainResult(self.state.nimg, reason)
