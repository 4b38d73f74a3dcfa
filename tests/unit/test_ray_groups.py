"""How the driver runs a group of Ray's workers: how it ended, and what room there is beside it.

Ray itself is replaced: `fit()` does what a test says, and messages are kept in this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2.api.exceptions import WorkerGroupError

from ganscale.checkpoint import CheckpointStore, RunInUse
from ganscale.config import Config
from ganscale.data.reader import DamagedSample
from ganscale.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    GanscaleError,
    TrainingFault,
)
from ganscale.launch import ray_train, ray_worker
from ganscale.launch.documents import IncompleteCopyWarning
from ganscale.launch.driver_actor import DriverActor, Messages
from ganscale.launch.ray_train import RayWorkers
from ganscale.launch.supervisor import Failure, Supervisor
from ganscale.training.stopping import StopRequest, TrainResult
from ganscale.world import World


class FakeActor:
    """A `DriverActor` in this process; raises what a dead one does if it `is_dead`."""

    def __init__(self, root: Path) -> None:
        self.real = DriverActor(str(root))
        self.is_dead = False

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            if self.is_dead:
                raise ActorDiedError()
            return getattr(self.real, name)(*args, **named)

        return SimpleNamespace(remote=call)


Fit = Callable[[Messages], TrainResult | None]


class Driver:
    """Workers of a run, whose groups do what `fits` says, first to last."""

    def __init__(self, config: Config, actor: FakeActor) -> None:
        self.config = config
        self.actor = actor
        self.fits: list[Fit] = []
        self.num_started = 0
        held = SimpleNamespace(require_free=lambda: None, session=None)
        self.workers = RayWorkers(config, cast(Any, held), lambda event, **fields: None)
        self.workers._trainer = self._trainer  # type: ignore[method-assign]

    def _trainer(self, num_workers: int, messages: Messages) -> Any:
        self.num_started += 1
        fit = self.fits.pop(0)
        return SimpleNamespace(fit=lambda: SimpleNamespace(return_value=fit(messages)))

    def run(self) -> TrainResult:
        return self.workers.run(2, StopRequest())


MakeDriver = Callable[..., Driver]


@pytest.fixture
def make_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeDriver:
    actor = FakeActor(tmp_path)
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr(ray_train, "start_driver_actor", lambda *_: actor)
    monkeypatch.setattr(ray_train, "_POLL_SECONDS", 0.01)

    def make(*fits: Fit, **launch: Any) -> Driver:
        changes = {f"launch.{name}": value for name, value in launch.items()}
        config = Config().with_changes({"storage": str(tmp_path), **changes})
        driver = Driver(config, actor)
        driver.fits = list(fits)
        return driver

    return make


def worker_raises(
    error: Exception, config: Config, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Messages], None]:
    """What a worker does on a host that sees the driver's folder when its loop raises `error`."""

    def train(*_: Any) -> TrainResult:
        raise error

    def run(messages: Messages) -> None:
        settings = {"messages": messages, "config": config.model_dump(), "session": None}
        with pytest.raises(type(error)):
            ray_worker.train_worker({**settings, "wandb": {}})

    monkeypatch.setattr(ray_worker, "_train", train)
    monkeypatch.setattr(ray_worker, "to_stderr", lambda *_: None)
    monkeypatch.setattr(ray_worker, "get_current_placement_group", lambda: None)
    monkeypatch.setattr(World, "detect", lambda device: World(0, 0, 2))
    return run


@pytest.mark.parametrize("is_elastic", [True, False])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("the batch"), ConfigError),
        (DamagedSample("sample 7"), DataError),
        (TrainingFault("no number"), TrainingFault),
        (RunInUse("in use"), CheckpointError),
        (GanscaleError("else"), GanscaleError),
    ],
)
def test_an_error_that_would_recur_ends_the_run_with_its_class(
    make_driver: MakeDriver,
    monkeypatch: pytest.MonkeyPatch,
    error: GanscaleError,
    kind: type[GanscaleError],
    is_elastic: bool,
) -> None:
    """Ray raises it where it may not start workers again; else workers of its own end quietly."""
    driver = make_driver(num_workers=(1, 2) if is_elastic else 2)
    worker = worker_raises(error, driver.config, monkeypatch)

    def fit(messages: Messages) -> None:
        worker(messages)
        if is_elastic:
            raise WorkerGroupError("a worker failed", {0: error})

    driver.fits = [fit] * 4
    monkeypatch.setattr(driver.workers, "room", lambda: 2)
    supervisor = Supervisor(driver.config, lambda: -1, lambda event, **fields: None)
    with pytest.raises(GanscaleError) as raised:
        supervisor.run(driver.workers, StopRequest())
    assert type(raised.value) is kind
    assert str(raised.value) == f"training failed on rank 0: {error}"
    assert driver.num_started == 1


def test_faults_of_workers_and_of_the_driver_s_actor_may_be_survived(
    make_driver: MakeDriver,
) -> None:
    def dies(messages: Messages) -> None:
        raise WorkerGroupError("lost", {1: RuntimeError("it was killed")})

    def actor_dies(messages: Messages) -> None:
        messages.put("error", (DataError, "rank 0: sample 7"))
        driver.actor.is_dead = True

    driver = make_driver(dies, actor_dies, lambda messages: TrainResult(10), num_workers=(1, 2))
    with pytest.raises(Failure, match="rank 1: it was killed"):
        driver.run()
    with pytest.raises(Failure, match="ActorDiedError"):
        driver.run()
    driver.actor.is_dead = False
    assert driver.run() == TrainResult(10)


@pytest.mark.parametrize("ends_well", [True, False])
def test_the_driver_warns_of_what_was_not_copied_to_it(
    make_driver: MakeDriver, ends_well: bool
) -> None:
    def fit(messages: Messages) -> TrainResult:
        messages.put("not_copied", "not all of it was copied")
        if not ends_well:
            raise WorkerGroupError("lost", {1: RuntimeError("it was killed")})
        return TrainResult(10)

    driver = make_driver(fit, num_workers=(1, 2))
    with (
        nullcontext() if ends_well else pytest.raises(Failure),
        pytest.warns(IncompleteCopyWarning, match="not all of it was copied"),
    ):
        driver.run()


class FakePlaces:
    """Counts how often somebody looks for room, of which there is always some."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.num_given_back = 0

    def num_free(self, num_workers: int, *, at_least: int = 1) -> int:
        self.asked.append((num_workers, at_least))
        return num_workers

    def give_back(self) -> None:
        self.num_given_back += 1


def test_there_is_no_room_for_more_until_a_group_has_its_places(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for in the meantime could take the places that the group itself is to have."""
    room: dict[str, int] = {}

    def slowly(*arguments: Any) -> Any:
        room["as the actor starts"] = driver.workers.room()
        return driver.actor

    def fit(messages: Messages) -> TrainResult:
        room["as Ray starts workers"] = driver.workers.room()
        messages.put("places", "a placement group")
        room["while they train"] = driver.workers.room()
        messages.put("places", None)
        room["after a fault"] = driver.workers.room()
        return TrainResult(10)

    def require_free() -> None:
        room["as the store is read"] = driver.workers.room()

    monkeypatch.setattr(ray_train, "start_driver_actor", slowly)
    driver, places = make_driver(fit, num_workers=(1, 5)), FakePlaces()
    driver.workers._places = places  # type: ignore[assignment]
    driver.workers._held.require_free = require_free  # type: ignore[method-assign]
    room["before"] = driver.workers.room()
    driver.run()
    room["at the end"] = driver.workers.room()
    assert room == {
        "before": 5,
        "as the store is read": 0,
        "as the actor starts": 0,
        "as Ray starts workers": 0,
        "while they train": 3,
        "after a fault": 0,
        "at the end": 5,
    }
    assert places.asked == [(5, 1), (3, 1), (5, 1)]


def test_a_group_that_could_not_start_leaves_the_room_to_the_next(make_driver: MakeDriver) -> None:
    driver = make_driver(num_workers=(1, 5))
    driver.workers._places = FakePlaces()  # type: ignore[assignment]

    def refuse() -> None:
        raise RunInUse("another process")

    driver.workers._held.require_free = refuse  # type: ignore[method-assign]
    with pytest.raises(RunInUse):
        driver.run()
    assert driver.workers.room() == 5


def test_a_store_that_is_out_of_reach_does_not_hold_the_last_report_back(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object store raises errors of the network, which are of `OSError`."""

    def away(self: object) -> list[str]:
        raise ConnectionResetError("the store is away")

    monkeypatch.setattr(CheckpointStore, "lineage", away)
    config = make_driver().config
    with ray_worker._pointer(config) as pointer, pointer.as_directory() as folder:
        told = json.loads(Path(folder, "ganscale.json").read_text())
    assert told == {"run": str(config.run_dir), "checkpoint": None}
