"""A run belongs to one process at a time, wherever the others are and whatever clocks show."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from ganscale.checkpoint import Attempt, CheckpointStore, Heartbeat, Holder, RunInUse, Session
from ganscale.checkpoint import holder as module
from ganscale.launch.held_run import HeldRun
from ganscale.processes import process_start
from tests.support.attempts import saved_at


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.02)


@pytest.fixture
def here(tmp_path: Path) -> Holder:
    return Holder.here(tmp_path)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Holder:
    """A process of another machine, whose process ids say nothing here."""
    return replace(Holder.here(tmp_path), machine="another", host="another", pid=1)


@contextmanager
def sleeping_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def begin(store: CheckpointStore, holder: Holder, newest_attempt: int = 0) -> Attempt:
    session = Session(holder, newest_attempt)
    return store.claim(store.newest, session=session)[0]


def start(store: CheckpointStore, tmp_path: Path) -> Attempt:
    """What a second start does."""
    holder = Holder.here(tmp_path)
    return begin(store, holder, store.require_free(holder))


def test_an_attempt_names_its_holder_and_reads_it_back(
    store: CheckpointStore, here: Holder
) -> None:
    attempt = begin(store, here)
    assert attempt.holder == here
    assert store.attempts() == [attempt]
    assert f"process {here.pid} on {here.host} since 20" in str(here)


def test_one_start_makes_many_attempts(store: CheckpointStore, here: Holder) -> None:
    """After a restart by Ray, a rollback, or at another number of workers."""
    assert [begin(store, here).number for _ in range(3)] == [1, 2, 3]


def test_a_second_start_on_the_same_machine_is_refused_while_the_first_lives(
    store: CheckpointStore, here: Holder, tmp_path: Path
) -> None:
    with sleeping_process() as process:
        start_of_process = process_start(process.pid)
        assert start_of_process is not None
        first = replace(here, pid=process.pid, process_start=start_of_process)
        begin(store, first)
        before = sorted(store.backend.files())
        with pytest.raises(RunInUse, match=f"in use by process {process.pid} on .* since 20"):
            start(store, tmp_path)
        assert sorted(store.backend.files()) == before
        process.kill()
        while process_start(process.pid):  # until it is a zombie: nobody has waited for it
            time.sleep(0.01)
        assert start(store, tmp_path).number == 2
    assert process_start(process.pid) is None


def test_another_process_with_the_same_id_is_not_the_holder(
    store: CheckpointStore, here: Holder, tmp_path: Path
) -> None:
    begin(store, replace(here, process_start="0"))
    assert start(store, tmp_path).number == 2


def test_a_holder_elsewhere_is_alive_while_its_file_changes(
    store: CheckpointStore, elsewhere: Holder, tmp_path: Path
) -> None:
    reports: list[str] = []
    with Heartbeat(store.backend, elsewhere):
        begin(store, elsewhere)
        with pytest.raises(RunInUse, match="in use by process 1 on another"):
            store.require_free(Holder.here(tmp_path), report=reports.append)
    assert "waiting up to 0.5 s for a sign that it is alive" in reports[0]
    assert start(store, tmp_path).number == 2  # it has ended, and has removed its file


def test_a_holder_elsewhere_that_is_silent_is_dead(
    store: CheckpointStore, elsewhere: Holder, tmp_path: Path
) -> None:
    begin(store, elsewhere)
    assert store.backend.exists(elsewhere.beat_file)
    assert start(store, tmp_path).number == 2
    assert not store.backend.exists(elsewhere.beat_file)


@pytest.mark.parametrize(
    ("age", "waits"), [(-3600.0, True), (0.0, True), (500.0, True), (700.0, False)]
)
def test_clocks_save_the_wait_only_beyond_their_tolerance(
    local: CheckpointStore, elsewhere: Holder, tmp_path: Path, age: float, waits: bool
) -> None:
    """A clock that is ten minutes behind or hours ahead gives no live run away."""
    begin(local, elsewhere)
    local.backend.replace(elsewhere.beat_file, [json.dumps({"time": time.time() - age}).encode()])
    reports: list[str] = []
    assert local.require_free(Holder.here(tmp_path), report=reports.append) == 1
    assert bool(reports) == waits


def test_a_take_over_ends_the_first_for_good(
    store: CheckpointStore, here: Holder, elsewhere: Holder
) -> None:
    first, second = HeldRun(store, Session(elsewhere, 0)), HeldRun(store, Session(here, 0))
    with Heartbeat(store.backend, elsewhere), Heartbeat(store.backend, here):
        assert (first.is_current(), second.is_current()) == (False, False)
        begin(store, elsewhere)
        assert (first.is_current(), second.is_current()) == (True, False)
        newest = store.require_free(here, newest_known=sys.maxsize)
        begin(store, here, newest)
        assert (first.is_current(), second.is_current()) == (False, True)
        with pytest.raises(RunInUse):  # the restart of a worker does not take the run back
            begin(store, elsewhere)


def test_of_two_starts_that_waited_the_later_claim_is_refused(
    store: CheckpointStore, here: Holder, elsewhere: Holder
) -> None:
    """Both found the run free, and then waited for room on the cluster."""
    found_free = [store.require_free(holder) for holder in (here, elsewhere)]
    begin(store, here, found_free[0])
    with pytest.raises(RunInUse, match=f"process {here.pid}"):
        begin(store, elsewhere, found_free[1])
    assert [attempt.holder for attempt in store.attempts()] == [here]


def test_attempts_without_a_holder_are_free(store: CheckpointStore, tmp_path: Path) -> None:
    """Those of earlier versions, and of programs that call `train` themselves."""
    store.claim(store.newest)
    assert start(store, tmp_path).number == 2


def test_renewals_are_no_checkpoints(store: CheckpointStore, here: Holder) -> None:
    attempt = begin(store, here)
    name = store.write(attempt, saved_at(1000))
    here.beat(store.backend)
    assert store.names() == [name]
    assert store.unfinished() == []
    assert store.repair() == []
    assert store.backend.exists(here.beat_file)


def test_a_store_that_is_away_changes_nothing_of_what_is_known(
    local: CheckpointStore, here: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldRun(local, Session(here, 0))

    def away(self: object) -> list[str]:
        raise OSError("away")

    with monkeypatch.context() as patch:
        patch.setattr(type(local.backend), "files", away)
        assert not held.is_current()
    begin(local, here)
    assert held.is_current()
    with monkeypatch.context() as patch:
        patch.setattr(type(local.backend), "files", away)
        assert held.is_current()
    local.claim(local.newest)
    assert not held.is_current()


def test_the_file_is_renewed_only_once_an_attempt_has_begun(
    store: CheckpointStore, here: Holder
) -> None:
    with Heartbeat(store.backend, here):
        time.sleep(0.15)
        assert store.backend.files() == []
        begin(store, here)
        first = store.backend.read(here.beat_file)
        while store.backend.read(here.beat_file) == first:
            time.sleep(0.01)
    assert not store.backend.exists(here.beat_file)
