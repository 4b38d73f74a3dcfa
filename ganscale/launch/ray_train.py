"""Train under Ray Train: DDP workers on this machine or a cluster.

Ray starts the workers, and starts them again when one is gone; `launch.supervisor` decides what
happens when that does not help, or the number of workers has to change.
Which checkpoint they go on from is decided by our manifests, so what Ray has stored of earlier
groups is never read.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError
from ray.util import remove_placement_group

from ganscale.config import Config
from ganscale.errors import GanscaleError
from ganscale.launch.documents import IncompleteCopyWarning
from ganscale.launch.driver_actor import Messages, marked, start_driver_actor
from ganscale.launch.fault_callback import FaultCallback, first_cause
from ganscale.launch.held_run import HeldRun
from ganscale.launch.places import Places
from ganscale.launch.ray_cluster import cluster, require_capacity, resources_text, worker_takes
from ganscale.launch.ray_worker import train_worker
from ganscale.launch.secrets import for_workers
from ganscale.launch.signals import stopping_on_signals
from ganscale.launch.supervisor import Failure, Supervisor
from ganscale.tracking.wandb_sink import variables
from ganscale.training.stopping import StopRequest, TrainResult

_POLL_SECONDS = 0.3


def train_on_ray(config: Config, supervisor: Supervisor, held: HeldRun) -> TrainResult:
    """Run the training loop in Ray workers, restarted after faults, and wait for the end.

    Uses the cluster at `launch.ray_address` or RAY_ADDRESS, else starts Ray here without a
    dashboard and ends it afterwards. Raises `ConfigError` if the workers do not fit on a Ray that
    was started here, `GanscaleError` when training failed for good: with the message and of the
    class, such as `DataError` or `TrainingFault`, of the worker's error.
    """
    stop = StopRequest()
    # In this order: Ray replaces the handlers of signals when it starts.
    with (
        cluster(config.launch.ray_address) as is_joined,
        stopping_on_signals(stop, config.launch.grace_seconds),
    ):
        return train_in_groups(config, supervisor, stop, held, is_joined=is_joined)


def train_in_groups(
    config: Config, supervisor: Supervisor, stop: StopRequest, held: HeldRun, *, is_joined: bool
) -> TrainResult:
    """Run the training loop in workers of the Ray that this process is connected to."""
    if not is_joined:
        require_capacity(config)
    workers = RayWorkers(config, held, supervisor.note)
    try:
        return supervisor.run(workers, stop)
    finally:
        workers.close()


class RayWorkers:
    """Groups of workers on a Ray cluster, one after the other.

    `note` takes events.
    """

    def __init__(self, config: Config, held: HeldRun, note: Callable[..., Any]) -> None:
        self.config = config
        self._held = held
        self._note = note
        self._num_workers = 0
        """In the group that is starting or trains; 0 without one."""
        self._messages: Messages | None = None
        """With that group, once nothing is asked for any more that it needs itself."""
        self._takes = worker_takes(config)
        self._places = Places(self._takes)

    def close(self) -> None:
        """Give back what was asked for."""
        self._places.give_back()

    def room(self) -> int:
        """How many more workers fit on the cluster now; none while a group takes its places, or
        the cluster's head does not answer."""
        launch = self.config.launch
        # Read once, in this order: another thread may be about to run a group.
        num_workers, messages = self._num_workers, self._messages
        try:
            if not num_workers:
                return self._places.num_free(launch.max_workers, at_least=launch.min_workers)
            if messages is None or messages.get("places") is None:
                return 0
            return self._places.num_free(launch.max_workers - num_workers)
        except RayError:
            return 0

    def explain_room(self) -> str:
        """What a worker takes and what the cluster has of it, in a few words."""
        each = resources_text(self._takes, self._takes)
        try:
            num_nodes = sum(node["Alive"] for node in ray.nodes())
            total, free = ray.cluster_resources(), ray.available_resources()
        except RayError:
            return f"each takes {each}; the cluster's head does not answer"
        return (
            f"each takes {each}; the cluster has {resources_text(total, self._takes)} on "
            f"{num_nodes} node(s), of which {resources_text(free, self._takes)} free"
        )

    def run(self, num_workers: int, stop: StopRequest) -> TrainResult:
        """Train with a group of workers until it ends, passing on `stop`.

        Raises `Failure` when a worker, its node or the controller is gone, the cause of an error
        that would recur, or `RunInUse` if another process has begun to train the run meanwhile.
        """
        self._num_workers = num_workers
        try:
            self._held.require_free()
            # An actor for each group, so that one that has died fails no other group.
            driver = start_driver_actor(self.config.run_dir, for_workers())
            messages = Messages(driver, secrets.token_hex(8))
            trainer = self._trainer(num_workers, messages)
            self._places.give_back()
            self._messages = messages
            with marked(self.config.run_dir, messages.group):
                ended = self._fit(trainer, messages, stop)
        finally:
            self._messages, self._num_workers = None, 0
        with suppress(RayError):
            if problem := messages.get("not_copied"):
                # Not only as an event: this host's disk may be full, which is the likely reason.
                warnings.warn(problem, IncompleteCopyWarning, stacklevel=2)
        if isinstance(ended, TrainResult):
            return ended
        _release_places(messages)
        raise self._explained(ended, messages) from ended

    def _fit(
        self, trainer: TorchTrainer, messages: Messages, stop: StopRequest
    ) -> TrainResult | BaseException | None:
        """How the group ended, as its workers or Ray say; meanwhile pass on `stop`, and note what
        the controller tells."""
        outcome: list[TrainResult | BaseException | None] = []

        def fit() -> None:
            try:
                outcome.append(trainer.fit().return_value)
            except BaseException as error:
                outcome.append(error)

        # Not in the main thread, where Ray would replace our signal handlers by its own.
        thread = threading.Thread(target=fit, name="fit", daemon=True)
        thread.start()
        passed_on, num_faults = "", 0
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            with suppress(RayError):  # it is tried again
                if (reason := stop.reason) != passed_on:
                    messages.put("stop", reason)
                    passed_on = reason
                faults = messages.get("faults") or []
                for fault in faults[num_faults:]:
                    self._note("fault", message=fault)
                num_faults = len(faults)
        return outcome[0]

    def _explained(self, error: BaseException | None, messages: Messages) -> BaseException:
        """The error that ends the run, or a `Failure` after which another group may go on.

        `error` is what Ray raised; None if its last workers only found what earlier ones had left.
        """
        # First, as Ray gives an error that would recur like any other fault of a worker, unless it
        # has started workers again, and these have ended without a word.
        try:
            if told := messages.get("error"):
                kind: type[GanscaleError] = told[0]
                return kind(f"training failed on {told[1]}")
        except RayError as lost:
            error = error or lost
        assert error is not None
        if isinstance(error, WorkerGroupError) and error.worker_failures:
            faults = self._num_restarts_by_ray() + 1
            return Failure(first_cause(error.worker_failures), faults=faults)
        if isinstance(error, PreemptionError):
            return Failure("a node was taken away", faults=0)
        if isinstance(error, TrainingFailedError | RayError):
            text = " ".join(str(error).split())[:300]
            return Failure(f"{type(error).__name__}: {text}")
        return error

    def _num_restarts_by_ray(self) -> int:
        """Ray restarts a group at its size, and waits long for a node that is gone: none where
        fewer workers may go on."""
        launch = self.config.launch
        return launch.max_failures if launch.min_workers == launch.max_workers else 0

    def _trainer(self, num_workers: int, messages: Messages) -> TorchTrainer:
        launch, folder = self.config.launch, self.config.run_dir / "ray"
        # What Ray keeps of a group is of no use to the next, and unreadable after some faults. The
        # controller keeps it on its own host, so a group has a folder that none had before.
        shutil.rmtree(folder, ignore_errors=True)
        return TorchTrainer(
            train_worker,
            train_loop_config={
                "config": self.config.model_dump(),
                "messages": messages,
                "session": self._held.session,
                "wandb": variables(),
            },
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if launch.use_gpu else "gloo",
                timeout_s=int(launch.timeout_seconds),
            ),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=launch.use_gpu,
                resources_per_worker=self._takes,
            ),
            run_config=RunConfig(
                name=self.config.name,
                storage_path=str(folder / messages.group),
                failure_config=FailureConfig(
                    max_failures=self._num_restarts_by_ray(),
                    controller_failure_limit=0,
                    max_preemption_failures=0,
                ),
                callbacks=[FaultCallback(messages)],
            ),
        )


def _release_places(messages: Messages) -> None:
    """Give back what a controller that was killed had reserved for its workers.

    Ray does so only when the whole job ends: it has a cleaner, but that needs Ray's dashboard.
    """
    with suppress(RayError):
        if (places := messages.get("places")) is not None:
            remove_placement_group(places)
