"""Train under Ray Train: DDP workers on this machine or a cluster.

Ray starts the workers, and starts them again when one is gone; `launch.supervisor` decides what
happens when that does not help, or the number of workers has to change.
Which checkpoint they go on from is decided by our manifests, so nothing is reported through Ray,
and what Ray has stored of earlier groups is never read. Driver and workers exchange two words, a
stop request and how a group ended, through the cluster's key-value store.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray._raylet import ActorID, PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from ganscale.checkpoint import Superseded
from ganscale.config import Config
from ganscale.errors import GanscaleError
from ganscale.launch.autoscaling import Wish
from ganscale.launch.held_run import HeldRun
from ganscale.launch.home import copied_home, home_of, marked
from ganscale.launch.ray_cluster import (
    cluster,
    num_fitting,
    require_capacity,
    resources_text,
    worker_takes,
)
from ganscale.launch.ray_metrics import RayMetrics
from ganscale.launch.secrets import for_workers
from ganscale.launch.signals import stopping_on_signals
from ganscale.launch.supervisor import Failure, Supervisor
from ganscale.tracking.logs import to_stderr
from ganscale.tracking.wandb_sink import variables
from ganscale.training.stopping import StopRequest, TrainResult
from ganscale.world import World

__all__ = ["tell", "told", "train_in_groups", "train_on_ray"]

_POLL_SECONDS = 0.3


def train_on_ray(config: Config, supervisor: Supervisor, held: HeldRun) -> TrainResult:
    """Run the training loop in Ray workers, restarted after faults, and wait for the end.

    Uses the cluster at `launch.ray_address` or RAY_ADDRESS, else starts Ray here without a
    dashboard and ends it afterwards. Raises `ConfigError` if the workers do not fit on a Ray that
    was started here, `GanscaleError` with the worker's message when training failed for good.
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
    home = home_of(config.run_dir, for_workers()) if is_joined else None
    workers = RayWorkers(config, held, supervisor.note, home)
    try:
        return supervisor.run(workers, stop)
    finally:
        workers.ask_for(0)


class RayWorkers:
    """Groups of workers on a Ray cluster, one after the other.

    `note` takes events; `home` is how workers on other hosts reach this one, None if there are
    none.
    """

    def __init__(
        self, config: Config, held: HeldRun, note: Callable[..., Any], home: Any = None
    ) -> None:
        self.config = config
        self._held = held
        self._note = note
        self._home = home
        self._token = ""
        """Of the group that is starting or trains."""
        self._missing = config.launch.max_workers
        self._takes = worker_takes(config)
        self._wish = Wish(config.name, self._takes)

    def ask_for(self, num_workers: int) -> None:
        """More workers than there are, of the cluster's autoscaler if it has one."""
        self._missing = num_workers
        self._wish.ask(num_workers)

    def room(self) -> int:
        """How many more workers fit on the cluster now; none while a group takes its places, or
        the cluster's head does not answer."""
        self._wish.ask(self._missing)
        try:
            return self._num_free()
        except RayError:
            return 0

    def _num_free(self) -> int:
        if self._token and not told(self._token, "in_place"):
            return 0
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        _release_what_the_dead_hold()  # after a call that has connected to the head's tables
        free = available_resources_per_node()
        return num_fitting(self._takes, [free[node] for node in free if node in alive])

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
        self._held.require_free()
        token = self._token = secrets.token_hex(8)
        trainer = self._trainer(num_workers, token)
        self.ask_for(self.config.launch.max_workers - num_workers)
        with marked(self.config.run_dir, token):
            ended = self._fit(trainer, token, stop)
        self._token, self._missing = "", self.config.launch.max_workers
        if isinstance(ended, TrainResult):
            return ended
        raise self._explained(ended) from ended

    def _fit(
        self, trainer: TorchTrainer, token: str, stop: StopRequest
    ) -> TrainResult | BaseException:
        """How the group ended; meanwhile pass on `stop`, and note what the controller tells."""
        outcome: list[TrainResult | BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
                if error := told(token, "error"):
                    raise GanscaleError(f"training failed on {error}")
                outcome.append(TrainResult(**json.loads(told(token, "ending"))))
            except BaseException as error:
                outcome.append(error)

        # Not in the main thread, where Ray would replace our signal handlers by its own.
        thread = threading.Thread(target=fit, name="fit", daemon=True)
        thread.start()
        passed_on, num_faults = "", 0
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            if (reason := stop.reason) != passed_on:
                with suppress(RayError):  # it is told again
                    tell(token, "stop", reason)
                    passed_on = reason
            num_faults = self._note_faults(token, num_faults)
        return outcome[0]

    def _note_faults(self, token: str, num_noted: int) -> int:
        """Write down the faults that the controller has told of; returns how many there are."""
        faults: list[str] = []
        with suppress(RayError):  # whoever waits for the group hears that the head is gone
            faults = json.loads(told(token, "faults") or "[]")
        for fault in faults[num_noted:]:
            self._note("fault", message=fault)
        return max(num_noted, len(faults))

    def _explained(self, error: BaseException) -> BaseException:
        """The error that ends the run, or a `Failure` after which another group may go on."""
        if isinstance(error, WorkerGroupError) and error.worker_failures:
            faults = self._num_restarts_by_ray() + 1
            return Failure(_first_cause(error.worker_failures), faults=faults)
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

    def _trainer(self, num_workers: int, token: str) -> TorchTrainer:
        launch, folder = self.config.launch, self.config.run_dir / "ray"
        # What Ray keeps of a group is of no use to the next, and unreadable after some faults. The
        # controller keeps it on its own host, so a group has a folder that none had before.
        shutil.rmtree(folder, ignore_errors=True)
        return TorchTrainer(
            _worker,
            train_loop_config={
                "config": self.config.model_dump(),
                "token": token,
                "home": self._home,
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
                storage_path=str(folder / token),
                failure_config=FailureConfig(
                    max_failures=self._num_restarts_by_ray(),
                    controller_failure_limit=0,
                    max_preemption_failures=0,
                ),
                callbacks=[_Faults(token)],
            ),
        )


def _worker(settings: dict[str, Any]) -> None:
    from ganscale.training.loop import train

    config, token = Config.model_validate(settings["config"]), settings["token"]
    home = settings["home"]
    if home is not None:
        os.environ.update(ray.get(home.secrets.remote()))
    if told(token, "error"):
        return  # Ray starts workers again after any error; this one would only come again
    world = World.detect("cuda" if config.launch.use_gpu else "cpu")
    os.environ.update(settings["wandb"])
    to_stderr(config.name, world.rank)
    sinks = [RayMetrics(config.name, config.total_nimg)] if world.is_main else []
    if world.is_main:
        tell(token, "in_place", "yes")
    stop = StopRequest()
    done = threading.Event()
    listener = threading.Thread(
        target=_listen, args=(token, world, stop, done), name="stop", daemon=True
    )
    listener.start()
    try:
        with copied_home(home, config.run_dir, token, world):
            ending = train(config, world, stop, sinks, settings["session"])
    except Superseded:
        raise  # by the group that has taken over, which may have this token
    except GanscaleError as error:
        tell(token, "error", f"rank {world.rank}: {error}")
        raise
    finally:
        done.set()
    if world.is_main:
        tell(token, "ending", json.dumps(asdict(ending)))


def _listen(token: str, world: World, stop: StopRequest, done: threading.Event) -> None:
    """Take up what the driver asks for; leave a node in time that is about to be taken away."""
    from ray.train.v2._internal.execution.context import get_train_context

    preemption = get_train_context().preemption_context
    while not done.wait(_POLL_SECONDS):
        with suppress(RayError):  # the head may be away for a while
            if world.is_main and (reason := told(token, "stop")):
                stop.reason = reason
        if not stop.reason and preemption.preemption_info is not None:
            stop.reason = "regroup"


def _release_what_the_dead_hold() -> None:
    """Give back what controllers that were killed had reserved on the cluster for their workers.

    Ray does so only when the whole job ends, and has a cleaner which may fail.
    """
    job = ray.get_runtime_context().get_job_id()
    for data in state._global_state_accessor.get_placement_group_table():
        group = PlacementGroupTableData.FromString(data)
        # Where no actor made it, as those of a sweep's trials, Ray calls the actor dead as well.
        by_actor = group.creator_actor_id not in (b"", ActorID.nil().binary())
        ours = group.creator_job_id.hex() == job and by_actor and group.creator_actor_dead
        if ours and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def tell(token: str, what: str, text: str) -> None:
    """Leave a message for the other side: the driver, or rank 0 of the group with this token."""
    _internal_kv_put(f"ganscale-{token}-{what}", text.encode(), overwrite=True)


def told(token: str, what: str) -> Any:
    """The message that the other side left; empty if there is none."""
    return (_internal_kv_get(f"ganscale-{token}-{what}") or b"").decode()


class _Faults(UserCallback):  # type: ignore[misc]
    """Tells the driver of faults, from Ray's controller, which outlives the workers and may be on
    any host: what happened, and that the group has lost its places until it has started again.
    """

    def __init__(self, token: str) -> None:
        self._token = token
        self._faults: list[str] = []

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._faults.append(_first_cause(worker_exceptions))
        with suppress(RayError):  # an error here would end the run
            tell(self._token, "faults", json.dumps(self._faults))
            tell(self._token, "in_place", "")


def _first_cause(failures: Mapping[int, Exception]) -> str:
    """What happened, in one line. Who lost touch with a worker says less than who was lost."""
    causes = [(rank, getattr(e, "_base_exc", e)) for rank, e in sorted(failures.items())]
    own = [(rank, cause) for rank, cause in causes if "Connection" not in str(cause)]
    rank, cause = (own or causes)[0]
    if type(cause).__name__ == "WorkerHealthCheckFailedError":
        return f"rank {rank} is gone"
    return f"rank {rank}: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
