"""Groups of workers follow each other as faults, room and requests to stop demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from ganscale.config import Config
from ganscale.errors import DataError, GanscaleError
from ganscale.launch import supervisor as module
from ganscale.launch.supervisor import Failure, Supervisor
from ganscale.training.stopping import StopRequest, TrainResult

Group = Callable[[int, StopRequest], TrainResult]


class Cluster:
    """Room for workers, and what each group of them does, first to last."""

    def __init__(self, *groups: Group, total: int = 8) -> None:
        self.groups = list(groups)
        self.total = total
        self.running = 0
        self.started: list[int] = []
        self.newest = -1
        self.notes: list[str] = []

    def room(self) -> int:
        return self.total - self.running

    def explain_room(self) -> str:
        return f"there are {self.total} places"

    def run(self, num_workers: int, stop: StopRequest) -> TrainResult:
        self.started.append(num_workers)
        self.running = num_workers
        try:
            return self.groups.pop(0)(num_workers, stop)
        finally:
            self.running = 0

    def fails(
        self, *, checkpoint: int | None = None, left: int | None = None, faults: int = 1
    ) -> Group:
        def group(num_workers: int, stop: StopRequest) -> TrainResult:
            self.newest = self.newest if checkpoint is None else checkpoint
            self.total = self.total if left is None else left
            raise Failure("rank 1 is gone", faults=faults)

        return group


def finishes(num_workers: int, stop: StopRequest) -> TrainResult:
    return TrainResult(1000)


def until_asked(num_workers: int, stop: StopRequest) -> TrainResult:
    deadline = time.monotonic() + 600
    while not stop.reason:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return TrainResult(500, stop.reason)


def supervise(cluster: Cluster, stop: StopRequest | None = None, **launch: Any) -> TrainResult:
    config = Config().with_changes({f"launch.{name}": value for name, value in launch.items()})
    supervisor = Supervisor(
        config, lambda: cluster.newest, lambda event, **_: cluster.notes.append(event)
    )
    return supervisor.run(cluster, stop or StopRequest())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROOM_SECONDS", 0.05)


def test_a_group_that_finishes_ends_the_run() -> None:
    cluster = Cluster(finishes)
    assert supervise(cluster, num_workers=2) == TrainResult(1000)
    assert cluster.started == [2]


@pytest.mark.parametrize("max_failures", [0, 1, 3])
def test_faults_without_progress_are_limited(max_failures: int) -> None:
    cluster = Cluster()
    cluster.groups = [cluster.fails() for _ in range(10)]
    with pytest.raises(GanscaleError, match="rank 1 is gone"):
        supervise(cluster, num_workers=2, max_failures=max_failures)
    assert len(cluster.started) == max_failures + 1


def test_a_newer_checkpoint_makes_up_for_a_fault() -> None:
    cluster = Cluster()
    cluster.groups = [*(cluster.fails(checkpoint=100 * n) for n in range(1, 9)), finishes]
    assert supervise(cluster, num_workers=2, max_failures=1) == TrainResult(1000)
    assert len(cluster.started) == 9


def test_restarts_within_a_group_count_as_many() -> None:
    cluster = Cluster()
    cluster.groups = [cluster.fails(faults=3), finishes]
    with pytest.raises(GanscaleError):
        supervise(cluster, num_workers=2, max_failures=2)


def test_minus_one_is_without_limit_and_a_lost_node_is_nobodys_fault() -> None:
    cluster = Cluster()
    cluster.groups = [*(cluster.fails() for _ in range(20)), finishes]
    assert supervise(cluster, num_workers=2, max_failures=-1) == TrainResult(1000)
    cluster.groups = [*(cluster.fails(faults=0) for _ in range(20)), finishes]
    assert supervise(cluster, num_workers=2, max_failures=0) == TrainResult(1000)


def test_an_error_that_would_come_again_ends_the_run_at_once() -> None:
    def group(num_workers: int, stop: StopRequest) -> TrainResult:
        raise DataError("shard 3 is damaged")

    cluster = Cluster(group, finishes)
    with pytest.raises(DataError, match="shard 3"):
        supervise(cluster, num_workers=2)
    assert len(cluster.started) == 1


def test_an_elastic_run_takes_what_is_left_and_grows_at_a_checkpoint() -> None:
    cluster = Cluster(total=4)

    def grows(num_workers: int, stop: StopRequest) -> TrainResult:
        cluster.total = 3
        return until_asked(num_workers, stop)

    cluster.groups = [cluster.fails(left=2), grows, finishes]
    assert supervise(cluster, num_workers=(1, 4)) == TrainResult(1000)
    assert cluster.started == [4, 2, 3]
    assert "regroup" in cluster.notes


def test_a_fixed_run_waits_for_room_and_never_grows() -> None:
    cluster = Cluster(total=1)

    def later(*_: Any, **__: Any) -> int:
        looks.append(1)
        return 0 if len(looks) < 3 else 5

    looks: list[int] = []
    cluster.groups = [finishes]
    cluster.room = later  # type: ignore[method-assign]
    assert supervise(cluster, num_workers=2) == TrainResult(1000)
    assert (cluster.started, cluster.notes) == ([2], ["waiting"])


def test_a_stop_reaches_the_group_or_ends_the_wait_for_one() -> None:
    stop = StopRequest()

    def asks(num_workers: int, wanted: StopRequest) -> TrainResult:
        stop.reason = "terminated"
        return until_asked(num_workers, wanted)

    assert supervise(Cluster(asks), stop, num_workers=2) == TrainResult(500, "terminated")
    nothing = Cluster(total=0)
    nothing.newest = 300
    ending = supervise(nothing, StopRequest("interrupted"), num_workers=2)
    assert ending == TrainResult(300, "interrupted", has_trained=False)
    assert nothing.started == []


def test_a_stop_reaches_the_group_though_the_room_cannot_be_known() -> None:
    stop, looks = StopRequest(), []
    cluster = Cluster()

    def no_answer() -> int:
        looks.append(1)
        if len(looks) > 1:
            stop.reason = "terminated"
            raise KeyError("state")
        return 2

    cluster.room = no_answer  # type: ignore[method-assign]
    cluster.groups = [until_asked]
    assert supervise(cluster, stop, num_workers=(1, 4)) == TrainResult(500, "terminated")
    assert len(looks) == 2


def test_room_that_is_free_because_the_group_has_ended_is_no_reason_to_regroup() -> None:
    cluster, ended, wanted = Cluster(), threading.Event(), StopRequest()
    looks: list[int] = []

    def room() -> int:
        looks.append(1)
        if len(looks) == 2:
            ended.set()
        return 3

    cluster.room = room  # type: ignore[method-assign]
    config = Config().with_changes({"launch.num_workers": (1, 4)})
    supervisor = Supervisor(config, lambda: -1, lambda event, **_: cluster.notes.append(event))
    supervisor._watch(cluster, 1, StopRequest(), wanted, ended)
    assert (len(looks), cluster.notes, wanted.reason) == (2, [], "")


def test_a_signal_has_something_to_finish_only_while_a_group_trains() -> None:
    """Else Ctrl-C would speak of a checkpoint while the run waits for room."""
    stop, seen = StopRequest(), []
    cluster = Cluster(total=0)

    def no_room_at_first() -> int:
        seen.append(stop.is_training)
        return 0 if len(seen) < 3 else 2

    def group(num_workers: int, wanted: StopRequest) -> TrainResult:
        seen.append(stop.is_training)
        return TrainResult(1000)

    cluster.room = no_room_at_first  # type: ignore[method-assign]
    cluster.groups = [group]
    supervise(cluster, stop, num_workers=2)
    assert seen == [False, False, False, True]
