"""Writing in the background: of the state at that moment, one at a time, and never endlessly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ganscale.checkpoint import BackgroundWriter, CheckpointName, CheckpointStore, Retention
from ganscale.checkpoint.files import SavedState
from ganscale.checkpoint.lineage import Attempt
from ganscale.checkpoint.store import Superseded
from ganscale.checkpoint.writer import HostCopy
from ganscale.errors import CheckpointError
from ganscale.storage import RetryPolicy
from tests.support.checkpoints import begin, bits

SHORT = RetryPolicy(deadline_seconds=0.1, first_delay_seconds=0.02, max_delay_seconds=0.04)
LONG = RetryPolicy(deadline_seconds=600, first_delay_seconds=0.01, max_delay_seconds=500)
WAIT = 200.0
"""Far more than anything here takes; far less than `LONG`."""


class TestedStore(CheckpointStore):
    """A store whose writes can be made to wait and to fail."""

    __test__ = False

    def __init__(self, location: Path) -> None:
        super().__init__(location)
        self.began = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.fail: Callable[[int, int], Exception | None] = lambda nimg, number: None
        self.tries: list[tuple[int, float]] = []
        self.num_at_once = 0
        self.most_at_once = 0

    def write(self, attempt: Attempt, state: SavedState) -> CheckpointName:
        self.tries.append((state.nimg, time.monotonic()))
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        try:
            self.began.set()
            assert self.gate.wait(WAIT)
            error = self.fail(state.nimg, len(self.tries))
            if error is not None:
                raise error
            return super().write(attempt, state)
        finally:
            self.num_at_once -= 1

    def tried(self) -> list[int]:
        return [nimg for nimg, _ in self.tries]


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def store(tmp_path: Path) -> TestedStore:
    return TestedStore(tmp_path / "run")


def background(store: TestedStore, policy: RetryPolicy = SHORT, **options: Any) -> BackgroundWriter:
    options = {"max_staleness_seconds": 600.0, **options}
    return BackgroundWriter(store, begin(store), Retention(keep_last=9), policy, **options)


def state_at(nimg: int) -> dict[str, Any]:
    return {"weight": torch.full((3, 2), float(nimg)), "list": [nimg, (nimg,)], "nimg": nimg}


def refuse(nimg: int, number: int) -> Exception:
    return ConnectionError("the store\nis away")


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_is_written_is_the_state_when_it_was_submitted(store: TestedStore) -> None:
    writer = background(store)
    store.gate.clear()
    state = state_at(1)
    writer.submit(1, state, {"run": "test"}, history=b"row\n", metrics={"score": 2.0})
    state["weight"].fill_(99.0)
    state["list"].append(99)
    state["nimg"] = 99
    assert store.began.wait(WAIT)
    assert writer.results() == []
    store.gate.set()
    (result,) = writer.finish()
    assert (result.nimg, result.name, result.problem) == (1, CheckpointName(1, 1), "")
    files = store.read(CheckpointName(1, 1))
    assert bits(files.state()) == bits(state_at(1))
    assert (files.meta["run"], files.history) == ("test", b"row\n")
    assert store.metrics(CheckpointName(1, 1)) == {"score": 2.0}


def test_old_checkpoints_are_pruned_in_the_background(store: TestedStore) -> None:
    writer = background(store)
    writer.retention = Retention(keep_last=1)
    for nimg in (1, 2, 3, 4):
        writer.submit(nimg, state_at(nimg), {}, healthy_nimg=2)
    assert [result.nimg for result in writer.finish()] == [1, 2, 3, 4]
    assert [name.nimg for name in store.names()] == [2, 4]


def test_the_next_waits_for_the_one_in_flight(store: TestedStore) -> None:
    writer = background(store)
    store.gate.clear()
    began = time.perf_counter()
    writer.submit(1, state_at(1), {})
    assert time.perf_counter() - began < WAIT / 2
    second = threading.Thread(target=writer.submit, args=(2, state_at(2), {}))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    assert store.tried() == [1]
    store.gate.set()
    second.join(WAIT)
    results = writer.finish()
    assert [result.name for result in results] == [CheckpointName(1, 1), CheckpointName(2, 1)]
    assert results[0].stall_seconds < WAIT / 2
    assert min(results[1].stall_seconds, results[0].write_seconds) >= 0.05
    assert store.most_at_once == 1
    for nimg in (1, 2):
        assert bits(store.read(CheckpointName(nimg, 1)).state()) == bits(state_at(nimg))


def test_a_failing_store_is_asked_again_with_growing_delays(store: TestedStore) -> None:
    policy = RetryPolicy(deadline_seconds=WAIT, first_delay_seconds=0.04, max_delay_seconds=9)
    writer = background(store, policy)
    store.fail = lambda nimg, number: OSError("busy") if number <= 3 else None
    writer.submit(1, state_at(1), {})
    (result,) = writer.finish()
    assert (result.name, result.problem, writer.last_problem) == (CheckpointName(1, 1), "", "")
    times = [at for _, at in store.tries]
    delays = [after - before for before, after in zip(times, times[1:], strict=False)]
    # With jitter, each is at least half of 40, 80 and 160 ms.
    assert [delay >= least for delay, least in zip(delays, (0.02, 0.04, 0.08), strict=True)] == [
        True
    ] * 3


def test_a_store_that_stays_away_is_a_problem_and_the_next_is_tried(store: TestedStore) -> None:
    writer = background(store)
    store.fail = lambda nimg, number: refuse(nimg, number) if nimg == 1 else None
    writer.submit(1, state_at(1), {})
    (result,) = writer.finish()
    assert result.name is None
    assert result.problem == writer.last_problem == "ConnectionError: the store is away"
    assert len(store.tries) >= 3
    assert result.write_seconds < WAIT / 2
    writer.submit(2, state_at(2), {})
    (result,) = writer.finish()
    assert (result.name, result.problem, writer.last_problem) == (CheckpointName(2, 1), "", "")
    assert store.names() == [CheckpointName(2, 1)]


def test_a_newer_one_replaces_an_older_one_that_fails(store: TestedStore) -> None:
    writer = background(store, LONG)
    store.fail = lambda nimg, number: refuse(nimg, number) if nimg == 1 else None
    writer.submit(1, state_at(1), {})
    eventually(lambda: len(store.tries) >= 5)
    began = time.monotonic()
    writer.submit(2, state_at(2), {})
    first, second = writer.finish()
    assert time.monotonic() - began < WAIT
    assert (first.name, first.problem) == (None, "ConnectionError: the store is away")
    assert (second.name, second.problem) == (CheckpointName(2, 1), "")


def test_one_that_fails_while_a_newer_one_waits_is_not_tried_again(store: TestedStore) -> None:
    writer = background(store, RetryPolicy(deadline_seconds=30, first_delay_seconds=4))
    store.gate.clear()
    store.fail = lambda nimg, number: refuse(nimg, number) if nimg == 1 else None
    writer.submit(1, state_at(1), {})
    assert store.began.wait(WAIT)
    second = threading.Thread(target=writer.submit, args=(2, state_at(2), {}))
    second.start()
    time.sleep(0.05)
    store.gate.set()
    second.join(WAIT)
    assert [result.name for result in writer.finish()] == [None, CheckpointName(2, 1)]
    assert store.tried() == [1, 2]


def test_a_run_without_a_durable_checkpoint_for_too_long_ends(store: TestedStore) -> None:
    clock = Clock()
    writer = background(store, clock=clock, max_staleness_seconds=600.0)
    clock.seconds += 599
    writer.submit(1, state_at(1), {})
    assert [result.name for result in writer.finish()] == [CheckpointName(1, 1)]
    store.fail = refuse
    clock.seconds += 599  # since the first became durable
    writer.submit(2, state_at(2), {})
    assert [result.name for result in writer.finish()] == [None]
    clock.seconds += 31
    writer.submit(3, state_at(3), {})
    words = r"to .*run for 10\.5 minutes .*max_staleness_minutes.*; last: .* the store is away"
    with pytest.raises(CheckpointError, match=words) as error:
        writer.finish()
    assert not isinstance(error.value, Superseded)
    assert "\n" not in str(error.value)


def test_it_is_time_without_success_that_counts_and_not_time_without_tries(
    store: TestedStore,
) -> None:
    clock = Clock()
    writer = background(store, clock=clock)
    clock.seconds += 10_000
    assert writer.results() == []
    writer.submit(1, state_at(1), {})
    assert [result.name for result in writer.finish()] == [CheckpointName(1, 1)]


@pytest.mark.parametrize("late_seconds", [0, 10_000])
def test_a_superseded_writer_says_so(store: TestedStore, late_seconds: float) -> None:
    clock = Clock()
    writer = background(store, LONG, clock=clock)
    begin(store)
    clock.seconds += late_seconds
    writer.submit(1, state_at(1), {})
    for _ in range(2):
        with pytest.raises(Superseded, match="attempt 1 "):
            writer.finish()
    assert store.tried() == [1]
    assert store.names() == []


@pytest.mark.parametrize("error", [TypeError, AttributeError, AssertionError, NameError])
def test_a_programming_error_is_raised_and_not_tried_again(
    store: TestedStore, error: type[Exception]
) -> None:
    writer = background(store, LONG)
    store.fail = lambda nimg, number: error("a bug")
    writer.submit(1, state_at(1), {})
    with pytest.raises(error, match="a bug"):
        writer.finish()
    assert store.tried() == [1]


def test_a_state_that_cannot_be_written_is_an_error_at_once(store: TestedStore) -> None:
    writer = background(store)
    with pytest.raises(TypeError, match="/odd is a set"):
        writer.submit(1, {"odd": {1}}, {})
    assert writer.finish() == []


@pytest.mark.parametrize("error", [OSError("full"), RuntimeError("odd")])
def test_what_cannot_be_pruned_is_no_problem(
    store: TestedStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def prune(*args: Any) -> None:
        raise error

    monkeypatch.setattr(store, "prune", prune)
    writer = background(store)
    writer.submit(1, state_at(1), {})
    (result,) = writer.finish()
    assert (result.name, result.problem) == (CheckpointName(1, 1), "")


@pytest.mark.parametrize("error", [Superseded("over"), TypeError("a bug")])
def test_errors_of_pruning_that_matter_are_raised(
    store: TestedStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def prune(*args: Any) -> None:
        raise error

    monkeypatch.setattr(store, "prune", prune)
    writer = background(store)
    writer.submit(1, state_at(1), {})
    with pytest.raises(type(error), match=str(error)):
        writer.finish()
    assert store.names() == [CheckpointName(1, 1)]


def test_close_does_not_wait_for_a_store_that_fails(store: TestedStore) -> None:
    writer = background(store, LONG)
    store.fail = refuse
    writer.submit(1, state_at(1), {})
    eventually(lambda: len(store.tries) >= 3)
    began = time.monotonic()
    writer.close()
    assert time.monotonic() - began < WAIT
    writer.close()
    assert [result.problem for result in writer.results()] == [writer.last_problem]
    assert "is away" in writer.last_problem


def test_close_lets_a_write_that_is_under_way_finish(store: TestedStore) -> None:
    for nimg in range(1, 21):  # whether or not the thread has begun to write
        writer = background(store)
        writer.submit(nimg, state_at(nimg), {})
        writer.close()
        assert [result.name for result in writer.results()] == [CheckpointName(nimg, nimg)]


def test_closing_and_finishing_without_a_write_do_nothing(store: TestedStore) -> None:
    writer = background(store)
    assert writer.finish() == []
    writer.close()
    assert writer.results() == []


def test_the_buffers_on_the_host_are_used_again() -> None:
    host = HostCopy()
    image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    first = host.take({"a": torch.ones(4), "b": image, "c": torch.tensor(1)})
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    assert first["b"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first["b"], image)

    a = torch.full((4,), 2.0, requires_grad=True)
    second = host.take({"a": a, "b": image + 1, "c": torch.tensor(1.0), "d": torch.ones(1)})
    assert second["a"].data_ptr() == places["a"] != a.data_ptr()
    assert second["b"].data_ptr() == places["b"]
    assert (second["a"].tolist(), second["a"].requires_grad) == ([2.0] * 4, False)
    assert torch.equal(second["b"], image + 1)
    assert (second["c"].dtype, second["c"].item()) == (torch.float32, 1.0)
    assert (first["c"].dtype, first["c"].item()) == (torch.int64, 1)
    assert host.take({"a": torch.ones(5)}).keys() == {"a"}
