"""A store that fails at any request costs no checkpoint."""

from __future__ import annotations

import gc
import json
import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from ganscale.checkpoint import Attempt, BackgroundWriter, CheckpointName, CheckpointStore
from ganscale.errors import CheckpointError, GanscaleError
from ganscale.storage import StoreError, objects
from tests.support.attempts import (
    HURRIED,
    NEWER,
    NEWEST_ONLY,
    OLDER,
    PATIENT,
    attempt_at,
    background,
    go_on,
    newest,
    save,
    saved_at,
)
from tests.support.checkpoints import begin
from tests.support.store_proxy import FAULTS, Bucket, Fault, Request, failing_bucket


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with failing_bucket(tmp_path_factory.mktemp("scratch")) as bucket:
        yield bucket


@pytest.fixture
def bucket(server: Bucket) -> Iterator[Bucket]:
    """Nothing is in it below "run", and nothing goes wrong."""
    server.proxy.work()
    yield server
    server.remove("run")


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    """The client asks once, so that each fault is an error."""
    monkeypatch.setattr(objects, "_NUM_TRIES", 1)


TOKEN = "the same each time"
SECOND = Attempt(2, CheckpointName(OLDER, 1), 0, TOKEN, "resume")
CHANGES = ("put", "begin upload", "upload part", "complete upload", "delete")
NOT_DONE: tuple[Fault, ...] = ("503", "reset", "cut", "500")


@pytest.fixture
def same_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that equal runs leave equal bytes."""
    monkeypatch.setattr(secrets, "token_hex", lambda num_bytes: TOKEN)


def claim(store: CheckpointStore) -> None:
    assert begin(store) == SECOND


def write(store: CheckpointStore) -> None:
    store.write(SECOND, saved_at(NEWER))


def prune(store: CheckpointStore) -> None:
    store.prune(SECOND, NEWEST_ONLY)


def write_in_background(store: CheckpointStore) -> None:
    writer = BackgroundWriter(store, SECOND, NEWEST_ONLY, PATIENT, max_staleness_seconds=600)
    assert save(writer, NEWER) == ""


@dataclass(frozen=True)
class Phase:
    """A part of an attempt: its requests, and what is in the store before and after."""

    action: Callable[[CheckpointStore], None]
    requests: list[Request]
    before: dict[str, bytes]
    after: dict[str, bytes]


def phases(bucket: Bucket, *actions: Callable[[CheckpointStore], None]) -> list[Phase]:
    """What each does when nothing goes wrong: one after the other, after an attempt at OLDER."""
    store = bucket.store("run")
    attempt_at(store, OLDER)
    found = []
    for action in actions:
        before = bucket.contents("run")
        bucket.proxy.work()
        action(store)
        found.append(Phase(action, bucket.proxy.requests, before, bucket.contents("run")))
    kinds = {request.kind for phase in found for request in phase.requests}
    assert kinds == {*CHANGES, "list", "head", "get"}
    bucket.remove("run")
    return found


def outages(requests: list[Request], all_of_them: bool) -> list[tuple[int, Fault]]:
    """Requests, and what goes wrong with them and all after them.

    All of them in all ways; or those that change something, with it done and not done, and a few of
    those that only look.
    """
    cases: list[tuple[int, Fault]] = []
    for request in requests:
        number = request.number
        if all_of_them:
            cases += [(number, fault) for fault in FAULTS]
        elif request.kind in CHANGES:
            cases += [(number, NOT_DONE[number % 4]), (number, "lost")]
        elif number % 3 == 1:
            cases.append((number, NOT_DONE[number // 3 % 4]))
    return cases


@pytest.mark.parametrize("all_of_them", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.usefixtures("one_try", "same_token")
def test_an_outage_from_any_request_on_loses_nothing(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, all_of_them: bool
) -> None:
    seen: set[frozenset[tuple[str, bytes]]] = set()
    positions: list[int] = []
    whole = phases(bucket, claim, write, prune)
    seconds = 1.0 if all_of_them else 30.0
    for phase in whole:
        for number, fault in outages(phase.requests, all_of_them):
            bucket.put("run", phase.before)
            bucket.proxy.fail(fault, first=number)
            error_of(partial(phase.action, bucket.store("run", attempt_seconds=seconds)))
            bucket.proxy.work()
            state = frozenset(bucket.contents("run").items())
            if state not in seen:
                seen.add(state)
                try:
                    positions.append(go_on(bucket.store("run"), bucket.copy))
                except Exception as error:
                    error.add_note(f"{fault} from request {number} on left {sorted(dict(state))}")
                    raise
            bucket.remove("run")
    assert len(positions) > 10
    # In the order of the requests: the older one until the newer one is there, and never again.
    assert positions == sorted(positions)
    assert set(positions) == {OLDER, NEWER}


def error_of(action: Callable[[], object]) -> Exception:
    """What it raises: nothing that would end a run before it has been tried until the deadline."""
    try:
        action()
    except Exception as error:
        found = error
    else:
        raise AssertionError("nothing was raised")
    bugs = (AssertionError, AttributeError, NameError, TypeError)
    assert not isinstance(found, (Warning, *bugs)), repr(found)
    assert isinstance(found, StoreError) or not isinstance(found, GanscaleError), repr(found)
    return found


def blips(requests: list[Request], all_of_them: bool) -> list[tuple[int, Fault]]:
    """Requests, and what goes wrong with them: all in all ways, or the same choice in one way."""
    cases: list[tuple[int, Fault]] = []
    for request in requests:
        number = request.number
        if all_of_them:
            cases += [(number, fault) for fault in FAULTS]
        elif request.kind in CHANGES:
            cases.append((number, "lost" if number % 2 else "cut"))
        elif number % 6 == 1:
            cases.append((number, NOT_DONE[number // 6 % 4]))
    return cases


@pytest.mark.parametrize("all_of_them", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.usefixtures("same_token")
def test_a_request_that_fails_once_changes_nothing(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, all_of_them: bool
) -> None:
    whole = phases(bucket, claim, write_in_background)
    seconds = 1.0 if all_of_them else 30.0
    for phase in whole:
        for number, fault in blips(phase.requests, all_of_them):
            bucket.put("run", phase.before)
            bucket.proxy.fail(fault, first=number, num=1)
            phase.action(bucket.store("run", deadline_seconds=60, attempt_seconds=seconds))
            assert bucket.contents("run") == phase.after
            # Nobody learned of the first beginning.
            kind = phase.requests[number - 1].kind
            assert bucket.num_uploads("run") == (
                kind == "begin upload" and fault in ("lost", "cut")
            )
            bucket.remove("run")


@pytest.mark.usefixtures("one_try")
def test_a_store_that_stalls_is_an_error_after_the_timeout(bucket: Bucket) -> None:
    store = bucket.store("run")
    attempt_at(store, OLDER)
    hasty = bucket.store("run", attempt_seconds=0.5)
    for kind in ("put", "upload part"):
        bucket.proxy.fail("stall", kind=kind, num=1)
        assert "(timeout)" in str(error_of(partial(attempt_at, hasty, NEWER)))
        assert kind in bucket.proxy.kinds()[-2:]  # and perhaps an abort
    assert go_on(store, bucket.copy) == OLDER


@pytest.mark.parametrize(
    "num_refused",
    [
        pytest.param(1, marks=pytest.mark.slow, id="abort works"),
        pytest.param(math.inf, id="abort fails"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "number"), [("upload part", 1), ("upload part", 2), ("complete upload", 1)]
)
@pytest.mark.usefixtures("one_try")
def test_a_try_that_failed_never_touches_what_a_later_one_has_written(
    bucket: Bucket, kind: str, number: int, num_refused: float
) -> None:
    store = bucket.store("run")
    attempt = begin(store)
    bucket.proxy.fail("503", kind=kind, first=number, num=num_refused)
    error = error_of(partial(store.write, attempt, saved_at(NEWER)))
    assert bucket.num_uploads("run") == (num_refused > 1)
    bucket.proxy.work()
    store.write(attempt, saved_at(NEWER))
    whole = bucket.contents("run")
    num_requests = len(bucket.proxy.requests)
    assert error.__traceback__ is not None  # which holds what the first try wrote with
    del error
    gc.collect()
    assert len(bucket.proxy.requests) == num_requests
    assert bucket.contents("run") == whole
    assert newest(bucket.copy(store)).nimg == NEWER


@pytest.mark.parametrize("kind", ["upload part", pytest.param("put", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("one_try")
def test_a_checkpoint_is_saved_when_a_storm_of_refusals_is_over(bucket: Bucket, kind: str) -> None:
    store = bucket.store("run")
    writer = background(store, PATIENT)
    bucket.proxy.fail("503", kind=kind, num=20)
    assert save(writer, OLDER) == ""
    assert len(bucket.proxy.requests) > 20
    assert save(writer, NEWER) == ""
    gc.collect()
    assert [name.nimg for name in store.names()] == [NEWER]
    assert newest(bucket.copy(store)).nimg == NEWER


@pytest.mark.usefixtures("one_try")
def test_a_store_that_stays_away_is_a_problem_and_then_the_end(bucket: Bucket) -> None:
    store = bucket.store("run")
    seconds = 0.0
    writer = background(store, HURRIED, clock=lambda: seconds, max_staleness_seconds=600.0)
    assert save(writer, OLDER) == ""
    bucket.proxy.fail("503")
    for nimg in (NEWER, NEWER + 1):
        seconds += 300
        problem = save(writer, nimg)
        assert problem.startswith("OSError: s3://runs/run/")
        assert "503 Service Unavailable" in problem
    seconds += 1
    with pytest.raises(CheckpointError, match=r"s3://runs/run for 10\.0 minutes .*Unavailable"):
        save(writer, NEWER + 2)
    bucket.proxy.work()
    assert go_on(store, bucket.copy) == OLDER


def test_the_claim_of_another_is_not_taken_for_one_whose_answer_was_lost(bucket: Bucket) -> None:
    store = bucket.store("run")
    attempt_at(store, OLDER)
    other = Attempt(2, None, 0, "another", "resume")

    def fault(request: Request) -> Fault | None:
        """Another writer is first, and the client learns of it when it asks again."""
        if request.kind != "put" or not request.key.endswith("a0002.json"):
            return None
        first = not bucket.contents("run").get("attempts/a0002.json")
        bucket.put("run", {"attempts/a0002.json": json.dumps(other.to_json()).encode()})
        return "reset" if first else None

    bucket.proxy.work()
    bucket.proxy.fault = fault
    attempt = begin(store)
    assert bucket.proxy.kinds().count("put") >= 3
    assert (attempt.number, attempt.start) == (3, None)  # as the other's is the run now
    assert store.attempts()[1:] == [other, attempt]
