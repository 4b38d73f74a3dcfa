"""A disk that fills at any byte and a store that fails at any request cost no checkpoint."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import resource
import secrets
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from ganscale.checkpoint import (
    Attempt,
    BackgroundWriter,
    CheckpointName,
    CheckpointStore,
    Retention,
    places,
)
from ganscale.checkpoint.store import SavedState, saved_state
from ganscale.data.storage import RetryPolicy
from ganscale.errors import CheckpointError, GanscaleError
from tests.support.checkpoints import begin, bits
from tests.support.store_proxy import FAULTS, Bucket, Fault, Request, failing_bucket

OLDER, NEWER, NEXT = 1000, 2000, 3000
NEWEST_ONLY = Retention(keep_last=1)
TENSORS, TREE, META, HISTORY = "state.safetensors", "state.json", "meta.json", "metrics.jsonl"
MANIFEST = "manifest.json"
FILES = (TENSORS, TREE, META, HISTORY, MANIFEST)
"""In the order in which they are written."""
PAGE_BYTES = 4096
HURRIED = RetryPolicy(deadline_seconds=0.2, first_delay_seconds=0.02, max_delay_seconds=0.05)
PATIENT = RetryPolicy(deadline_seconds=60, first_delay_seconds=0.01, max_delay_seconds=0.02)


def state_at(nimg: int) -> dict[str, Any]:
    """Its tensors take two pages, and an upload in two parts."""
    return {"weight": torch.arange(nimg, nimg + 1500, dtype=torch.float32), "nimg": nimg}


def saved_at(nimg: int) -> SavedState:
    return saved_state(nimg, state_at(nimg), {"run": "test"}, history=b"{}\n")


def attempt_at(store: CheckpointStore, nimg: int) -> None:
    """One attempt that goes on from the newest, writes a checkpoint, and prunes."""
    attempt = begin(store)
    store.write(attempt, saved_at(nimg))
    store.prune(attempt, NEWEST_ONLY)


def background(store: CheckpointStore, policy: RetryPolicy, **options: Any) -> BackgroundWriter:
    options = {"max_staleness_seconds": 600.0, **options}
    return BackgroundWriter(store, begin(store), NEWEST_ONLY, policy, **options)


def save(writer: BackgroundWriter, nimg: int) -> str:
    """Write a checkpoint in the background; the problem, if it could not be."""
    writer.submit(nimg, state_at(nimg), {"run": "test"}, history=b"{}\n")
    (outcome,) = writer.finish()
    assert (outcome.name is None) == (outcome.problem != "")
    return outcome.problem


def newest(store: CheckpointStore) -> CheckpointName:
    """What a run goes on from. All that count as checkpoints are whole."""
    assert [store.verify(name) for name in store.names()] == [None] * len(store.names())
    files = store.newest()
    assert files is not None
    assert bits(files.state()) == bits(state_at(files.name.nimg))
    return files.name


def go_on(
    store: CheckpointStore, copy: Callable[[CheckpointStore], CheckpointStore] = lambda store: store
) -> int:
    """The position that a run goes on from after a fault; and that it does, without a trace.

    `copy` may give one that is looked at in its place.
    """
    start = newest(copy(store))
    attempt_at(store, NEXT)
    seen = copy(store)
    name = newest(seen)
    assert (name.nimg, seen.attempts()[-1].start) == (NEXT, start)
    claims = [f"attempts/a{number:04d}.json" for number in range(1, name.attempt + 1)]
    assert seen.place.files() == sorted([*claims, *(f"{name}/{file}" for file in FILES)])
    return start.nimg


# A disk that is full.


@dataclass(frozen=True)
class SmallDisk:
    """A file system in memory with little room."""

    path: Path

    def used(self) -> tuple[int, int]:
        """Pages and inodes."""
        found = os.statvfs(self.path)
        return found.f_blocks - found.f_bfree, found.f_files - found.f_ffree

    def leave(self, *, pages: int = 1000, inodes: int = 1000) -> None:
        """Make it so large that this is free."""
        used_pages, used_inodes = self.used()
        size = (used_pages + pages) * PAGE_BYTES
        problem = mount(self.path, f"remount,size={size},nr_inodes={used_inodes + inodes}")
        assert not problem


def mount(path: Path, options: str) -> str:
    """Mount a file system in memory; why it could not be, if so."""
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip() or "no reason given" if done.returncode else ""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    assert os.sysconf("SC_PAGE_SIZE") == PAGE_BYTES
    problem = mount(tmp_path, "size=1m,nr_inodes=1000")
    if problem:
        pytest.skip(f"no file system can be mounted here, as root could: {problem}")
    try:
        yield SmallDisk(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


PLACES_OF_FAILURE = {
    "pages": ["claim", TENSORS, TENSORS, TREE, META, HISTORY, MANIFEST],
    "inodes": ["claim", "folder", *FILES],
}


@pytest.mark.parametrize("what", ["pages", "inodes"])
def test_a_full_disk_costs_only_the_checkpoint_that_does_not_fit(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    steps: list[str] = []
    add = places._LocalFolder.add

    def add_and_tell(folder: Any, name: str, pieces: Any) -> None:
        steps.append(name)
        add(folder, name, pieces)

    monkeypatch.setattr(places._LocalFolder, "add", add_and_tell)
    template, root = disk.path / "template", disk.path / "run"
    attempt_at(CheckpointStore(template), OLDER)
    failed_at = []
    for room in count():
        shutil.copytree(template, root)
        store = CheckpointStore(root)
        folders = sorted(path.name for path in root.iterdir())
        used_pages, _ = disk.used()
        disk.leave(**{what: room})
        steps[:] = ["claim"]
        problem = None
        try:
            attempt = begin(store)
            steps.append("folder")
            store.write(attempt, saved_at(NEWER))
        except OSError as error:
            problem = error.errno
        if problem is None:
            break
        assert problem == errno.ENOSPC
        failed_at.append(steps[-1])
        assert newest(store).nimg == OLDER
        assert sorted(path.name for path in root.iterdir()) == folders
        assert disk.used()[0] <= used_pages + 1  # the claim
        disk.leave()
        assert go_on(store) == OLDER
        shutil.rmtree(root)
    assert failed_at == PLACES_OF_FAILURE[what]
    assert newest(store).nimg == NEWER


def test_training_goes_on_while_the_disk_is_full_and_saves_when_it_is_not(disk: SmallDisk) -> None:
    store = CheckpointStore(disk.path / "run")
    attempt_at(store, OLDER)
    writer = background(store, HURRIED)
    disk.leave(pages=4)
    used = disk.used()
    for nimg in (NEWER, NEWER + 1, NEWER + 2):
        assert save(writer, nimg) == "OSError: [Errno 28] No space left on device"
        assert disk.used() == used
        assert newest(store).nimg == OLDER
    disk.leave()
    assert save(writer, NEXT) == ""
    assert newest(store).nimg == NEXT
    assert [name.nimg for name in store.names()] == [NEXT]


def test_a_disk_with_room_for_two_holds_a_run_that_keeps_one(disk: SmallDisk) -> None:
    store = CheckpointStore(disk.path / "run")
    attempt_at(store, OLDER)
    writer = background(store, HURRIED)
    pages, inodes = disk.used()
    disk.leave(pages=pages - 2, inodes=6)  # of which the attempts take two
    for nimg in range(NEWER, NEWER + 5):
        assert save(writer, nimg) == ""
        assert [name.nimg for name in store.names()] == [nimg]
    assert disk.used() == (pages, inodes)


# A limit on the size of files, which can be set to any byte.

LARGE_BYTES = 20_000


def saved_with_large(file: str) -> SavedState:
    """A state of which one file, and only that, is larger than 7,000 bytes."""
    text = "x" * LARGE_BYTES
    state = state_at(NEWER)
    if file in (TENSORS, TREE):
        state["more"] = torch.zeros(LARGE_BYTES, dtype=torch.uint8) if file == TENSORS else text
    return saved_state(
        NEWER,
        state,
        {"text": text} if file == META else {},
        history=text.encode() if file == HISTORY else b"",
        metrics={text: 0.5} if file == MANIFEST else {},
    )


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def limits_below(size: int, step: int) -> list[int]:
    """Up to the last byte; from 7,000 on if the file is larger."""
    return sorted({*range(7000 if size > 7000 else 0, size, step), size - 1})


def cut_files(root: Path, step: int) -> dict[str, int]:
    """How often the claim and each of the files was cut off; see the test."""
    warnings.simplefilter("error")
    template = root / "template"
    attempt_at(CheckpointStore(template), OLDER)
    num_cuts = dict.fromkeys(["claim", *FILES], 0)
    for file in num_cuts:
        state = saved_at(NEWER) if file == "claim" else saved_with_large(file)
        whole = root / f"whole-{file}"
        shutil.copytree(template, whole)
        store = CheckpointStore(whole)
        name = store.write(begin(store), state)
        path = whole / "attempts/a0002.json" if file == "claim" else whole / str(name) / file
        size = path.stat().st_size
        for limit in limits_below(size, min(step, size // 3)):
            shutil.copytree(template, root / "run")
            cut_at(CheckpointStore(root / "run"), state, limit, of_claim=file == "claim")
            shutil.rmtree(root / "run")
            num_cuts[file] += 1
        if file != "claim":  # it is that file that was cut, and at its last byte too
            with files_of_at_most(size):
                store.write(begin(store), state)
    return num_cuts


def cut_at(store: CheckpointStore, state: SavedState, limit: int, *, of_claim: bool) -> None:
    attempt = None if of_claim else begin(store)
    folders = sorted(os.listdir(store.location))
    with files_of_at_most(limit), pytest.raises(OSError, match="File too large") as error:
        store.write(attempt or begin(store), state)
    assert error.value.errno == errno.EFBIG
    assert newest(store).nimg == OLDER
    assert sorted(os.listdir(store.location)) == folders
    if attempt is not None:
        store.write(attempt, saved_at(NEWER))
        assert newest(store).nimg == NEWER
    assert go_on(store) == (OLDER if of_claim else NEWER)


@pytest.mark.parametrize("step", [pytest.param(173, marks=pytest.mark.slow), 4567])
def test_a_file_cut_off_at_any_byte_makes_no_checkpoint(tmp_path: Path, step: int) -> None:
    # A process of its own, since the limit is on all that it writes.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        num_cuts = pool.submit(cut_files, tmp_path, step).result()
    assert num_cuts.pop("claim") > 2
    assert set(num_cuts) == set(FILES)
    assert min(num_cuts.values()) > LARGE_BYTES // 2 // step


# A store that fails.


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
    options = places._options

    def with_one_try(location: str) -> dict[str, Any]:
        found = options(location)
        found["config_kwargs"]["retries"] = {"total_max_attempts": 1}
        return found

    monkeypatch.setattr(places, "_options", with_one_try)
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)


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
    if all_of_them:
        monkeypatch.setattr(places, "_TIMEOUT_SECONDS", 1)
    for phase in whole:
        for number, fault in outages(phase.requests, all_of_them):
            bucket.put("run", phase.before)
            bucket.proxy.fail(fault, first=number)
            error_of(partial(phase.action, bucket.store("run")))
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
    """What it raises: nothing that would end a run instead of being tried again."""
    try:
        action()
    except Exception as error:
        found = error
    else:
        raise AssertionError("nothing was raised")
    bugs = (AssertionError, AttributeError, NameError, TypeError)
    assert not isinstance(found, (GanscaleError, Warning, *bugs)), repr(found)
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
    if all_of_them:
        monkeypatch.setattr(places, "_TIMEOUT_SECONDS", 1)
    for phase in whole:
        for number, fault in blips(phase.requests, all_of_them):
            bucket.put("run", phase.before)
            bucket.proxy.fail(fault, first=number, num=1)
            phase.action(bucket.store("run"))
            assert bucket.contents("run") == phase.after
            # Nobody learned of the first beginning.
            kind = phase.requests[number - 1].kind
            assert bucket.num_uploads("run") == (
                kind == "begin upload" and fault in ("lost", "cut")
            )
            bucket.remove("run")


@pytest.mark.usefixtures("one_try")
def test_a_store_that_stalls_is_an_error_after_the_timeout(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = bucket.store("run")
    attempt_at(store, OLDER)
    with monkeypatch.context() as patch:
        patch.setattr(places, "_TIMEOUT_SECONDS", 0.5)
        hasty = bucket.store("run")
    for kind in ("put", "upload part"):
        bucket.proxy.fail("stall", kind=kind, num=1)
        assert "Timeout" in type(error_of(partial(attempt_at, hasty, NEWER))).__name__
        assert kind in bucket.proxy.kinds()[-2:]  # and perhaps an abort
    assert go_on(store, bucket.copy) == OLDER


@pytest.mark.parametrize("num_refused", [1, math.inf], ids=["abort works", "abort fails"])
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
    assert error.__traceback__ is not None  # which holds the file that the first try wrote to
    del error
    gc.collect()
    assert len(bucket.proxy.requests) == num_requests
    assert bucket.contents("run") == whole
    assert newest(bucket.copy(store)).nimg == NEWER


@pytest.mark.parametrize("kind", ["upload part", "put"])
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
        assert save(writer, nimg) == "OSError: [Errno 16] Service Unavailable"
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
