"""Attempts at a run: each has its own number, a newer one fences off the older, little is kept."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ganscale.checkpoint import (
    Attempt,
    CheckpointName,
    CheckpointStore,
    DamagedCheckpointWarning,
    Retention,
    SavedFiles,
    Superseded,
)
from tests.support.checkpoints import Raw, begin, newest, write


def positions(names: list[CheckpointName]) -> list[int]:
    return [name.nimg for name in names]


def test_attempts_are_numbered_and_say_where_they_start(local: CheckpointStore) -> None:
    first = begin(local)
    one, two = write(local, first, 1), write(local, first, 2)
    second, files = local.claim(local.newest)
    assert files is not None
    assert files.name == two
    third, _ = local.claim(lambda: local.newest(up_to=1), reason="rollback")
    fourth = begin(local)
    fifth, _ = local.claim(lambda: None)
    attempts = [first, second, third, fourth, fifth]
    assert [(a.number, a.start, a.num_rollbacks, a.reason) for a in attempts] == [
        (1, None, 0, "start"),
        (2, two, 0, "resume"),
        (3, one, 1, "rollback"),
        (4, one, 1, "resume"),
        (5, None, 1, "start"),
    ]
    assert len({attempt.token for attempt in attempts}) == 5
    assert local.attempts() == attempts


def test_the_one_that_claims_later_goes_on_from_what_the_earlier_one_leaves(
    store: CheckpointStore,
) -> None:
    first = begin(store)
    names: list[CheckpointName] = []

    def choose() -> SavedFiles | None:
        if not names:  # between the look for the next number and its claim
            names.append(write(store, first, 1))
            names.append(write(store, begin(store), 2))
        return store.newest()

    attempt, files = store.claim(choose)
    assert (attempt.number, attempt.start) == (3, names[1])
    assert files is not None
    assert files.name == names[1]
    assert [a.number for a in store.attempts()] == [1, 2, 3]


def test_attempts_that_begin_at_once_get_different_numbers(local: CheckpointStore) -> None:
    write(local, begin(local), 1)
    barrier, claimed = threading.Barrier(4), []

    def claim() -> None:
        store = CheckpointStore(local.location)
        first = True

        def choose() -> SavedFiles | None:
            nonlocal first
            if first:
                first = False
                barrier.wait(10)
            return store.newest()

        claimed.append(store.claim(choose)[0])

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(attempt.number for attempt in claimed) == [2, 3, 4, 5]
    assert sorted(claimed, key=lambda a: a.number) == local.attempts()[1:]


def test_a_claim_that_was_stored_though_the_store_says_no_is_ours(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = store.backend.create

    def create(name: str, data: bytes) -> bool:
        assert original(name, data)
        return original(name, data)  # as a library does whose first request lost its answer

    monkeypatch.setattr(store.backend, "create", create)
    assert [begin(store).number, begin(store).number] == [1, 2]
    assert [attempt.number for attempt in store.attempts()] == [1, 2]


@pytest.mark.parametrize("claim", [b"", b"\xff", b"[]", b'{"number": 2}', None])
def test_an_unreadable_claim_is_recovered_from_a_checkpoint(
    local: CheckpointStore, claim: bytes | None
) -> None:
    first = begin(local)
    names = [write(local, first, nimg) for nimg in (1, 2)]
    second, _ = local.claim(lambda: local.newest(up_to=1), reason="rollback")
    names.append(write(local, second, 3))
    raw = Raw(local)
    raw.put("attempts/a0002.json", raw.get("attempts/a0001.json") if claim is None else claim)
    assert local.attempts() == [first, second]
    assert local.lineage() == [names[2], names[0]]
    third = begin(local)
    assert (third.number, third.start, third.num_rollbacks) == (3, names[2], 1)


def test_the_number_of_an_unreadable_claim_is_not_used_again(local: CheckpointStore) -> None:
    first = begin(local)
    name = write(local, first, 1)
    begin(local)
    Raw(local).put("attempts/a0002.json", b"")
    assert local.attempts() == [first]
    third = begin(local)
    assert (third.number, third.start) == (3, name)


def test_a_newer_attempt_fences_off_the_older(store: CheckpointStore) -> None:
    old = begin(store)
    for nimg in (1, 2, 3):
        write(store, old, nimg)
    new = begin(store)
    before = Raw(store).all()
    with pytest.raises(Superseded, match=r"attempt 1 of the run in .* is over"):
        write(store, old, 4)
    with pytest.raises(Superseded, match="attempt 1 "):
        store.prune(old, Retention(keep_last=1))
    assert Raw(store).all() == before
    assert write(store, new, 4) == CheckpointName(4, 2) == newest(store)


@contextmanager
def claimed_at_check(store: CheckpointStore, number: int) -> Iterator[None]:
    """Another attempt begins just before the check of that number."""
    original, calls = store.check_current, 0

    def check(attempt: Attempt) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            begin(store)
        original(attempt)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "check_current", check)
        yield


def test_a_write_that_is_overtaken_does_not_count(store: CheckpointStore) -> None:
    old = begin(store)
    first = write(store, old, 1)
    with claimed_at_check(store, 2), pytest.raises(Superseded):
        write(store, old, 2)
    assert store.names() == [first]
    (second,) = store.attempts()[1:]
    assert second.start == first


def test_a_prune_that_is_overtaken_deletes_nothing(local: CheckpointStore) -> None:
    old = begin(local)
    names = [write(local, old, nimg) for nimg in (1, 2)]
    with claimed_at_check(local, 1), pytest.raises(Superseded):
        local.prune(old, Retention(keep_last=1))
    assert local.names() == names


def test_what_a_fenced_off_writer_still_stores_is_not_part_of_the_run(
    local: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = begin(local)
    first = write(local, old, 1)
    new = begin(local)
    with monkeypatch.context() as patch:
        patch.setattr(local, "check_current", lambda attempt: None)
        zombie = write(local, old, 9)
    assert zombie in local.names()
    assert newest(local) == first
    second = write(local, new, 2)
    assert local.lineage() == [second, first]
    assert local.prune(new, Retention(keep_last=2)) == [zombie]
    assert local.names() == [first, second]


def test_the_newest_are_kept(local: CheckpointStore) -> None:
    attempt = begin(local)
    for nimg in range(1, 6):
        write(local, attempt, nimg)
        gone = local.prune(attempt, Retention(keep_last=2))
        assert positions(gone) == ([nimg - 2] if nimg > 2 else [])
        assert positions(local.names()) == list(range(max(1, nimg - 1), nimg + 1))


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([5, 1, 9, 2, 3], [1, 3, 5]),
        ([5, None, None, 2, 3], [1, 5]),
        ([float("nan"), 2, 1, float("nan"), 0], [2, 3, 5]),
        ([float("-inf"), 1, float("inf"), 0, 9], [3, 5]),
        ([1, 1, 1, 1, 0], [1, 5]),
        ([5, 9, 9, 9, 7], [2, 5]),
        ([None] * 5, [5]),
    ],
)
def test_the_best_are_kept(
    local: CheckpointStore, scores: list[float | None], kept: list[int]
) -> None:
    attempt = begin(local)
    for nimg, score in enumerate(scores, start=1):
        metrics = {"other": -nimg} if score is None else {"score": score, "other": 0.0}
        write(local, attempt, nimg, metrics=metrics)
    local.prune(attempt, Retention(keep_last=1, keep_best=2, best_metric="score"))
    assert positions(local.names()) == kept


@pytest.mark.parametrize(("healthy", "kept"), [(3, [2, 5]), (2, [2, 5]), (1, [5]), (9, [5])])
def test_one_to_go_back_to_is_kept(local: CheckpointStore, healthy: int, kept: list[int]) -> None:
    attempt = begin(local)
    for nimg in (2, 4, 5):
        write(local, attempt, nimg)
    local.prune(attempt, Retention(keep_last=1), healthy_nimg=healthy)
    assert positions(local.names()) == kept


def test_what_a_rollback_left_behind_is_pruned(local: CheckpointStore) -> None:
    first = begin(local)
    for nimg in (1, 2, 3):
        write(local, first, nimg)
    second, _ = local.claim(lambda: local.newest(up_to=1), reason="rollback")
    assert positions(local.prune(second, Retention(keep_last=3))) == [2, 3]
    assert newest(local) == CheckpointName(1, 1)


def test_a_disk_that_is_away_for_a_moment_is_no_empty_one(
    local: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is back when the attempt is claimed, which then would begin the run anew."""
    write(local, begin(local), 1)

    def away(path: object) -> Iterator[os.DirEntry[str]]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    def choose() -> SavedFiles | None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", away)
            return local.newest()

    with pytest.raises(OSError, match="Stale"):
        local.claim(choose)
    assert [attempt.number for attempt in local.attempts()] == [1]


def unfinished(store: CheckpointStore, attempt: Attempt, nimg: int) -> str:
    """What a writer leaves that is killed before the manifest."""
    name = write(store, attempt, nimg)
    Raw(store).remove(f"{name}/manifest.json")
    return str(name)


def files_below(store: CheckpointStore, folder: str) -> list[str]:
    return [path for path in store.backend.files() if path.startswith(f"{folder}/")]


def test_what_killed_writers_left_behind_is_removed_later(store: CheckpointStore) -> None:
    first = begin(store)
    name, left = write(store, first, 1), unfinished(store, first, 2)
    assert newest(store) == name
    assert store.repair() == []
    assert files_below(store, left)  # its writer may be alive
    begin(store)
    assert store.repair() == [f"{left} was removed: its writer never finished it"]
    assert not files_below(store, left)
    assert newest(store) == name


@pytest.mark.parametrize("by", ["the attempt itself", "a later one"])
def test_pruning_removes_what_was_left_unfinished(store: CheckpointStore, by: str) -> None:
    first = begin(store)
    name, left = write(store, first, 1), unfinished(store, first, 2)
    attempt = first if by == "the attempt itself" else begin(store)
    assert store.prune(attempt, Retention()) == []
    assert not files_below(store, left)
    assert newest(store) == name


def test_a_claim_whose_answer_was_lost_counts_as_one_rollback(store: CheckpointStore) -> None:
    write(store, begin(store), 1)
    for _ in range(2):  # asked again, with the token of before
        attempt, _ = store.claim(store.newest, reason="rollback", token="mine")
    assert (attempt.number, attempt.num_rollbacks) == (3, 1)
    assert store.claim(store.newest, reason="rollback", token="next")[0].num_rollbacks == 2


@pytest.mark.parametrize("prefix", [".tmp-", ".tmp-removed-"])
def test_temporary_folders_of_earlier_attempts_are_removed(
    local: CheckpointStore, prefix: str
) -> None:
    name = write(local, begin(local), 1)
    left = Path(local.location) / f"{prefix}nimg-000000000002-a0001"
    left.mkdir()
    for path in Path(local.where(name)).iterdir():
        (left / path.name).write_bytes(path.read_bytes())
    assert newest(local) == name
    second = begin(local)
    local.prune(second, Retention())
    assert not left.exists()
    assert local.names() == [name]


def test_damaged_checkpoints_are_put_aside(store: CheckpointStore) -> None:
    attempt = begin(store)
    names = [write(store, attempt, nimg) for nimg in (1, 2, 3)]
    for name in names[1:]:
        Raw(store).put(f"{name}/meta.json", b"{}")
    with pytest.warns(DamagedCheckpointWarning):
        store.newest()
    problems = [f"{name} was moved to damaged/: {store.verify(name)}" for name in names[1:]]
    assert store.repair() == problems
    assert store.repair() == []
    assert newest(store) == names[0]
    assert store.names() == names[:1]
    assert len(files_below(store, f"damaged/{names[1]}")) == 5
