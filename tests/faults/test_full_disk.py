"""A disk that fills at any byte costs no checkpoint."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from ganscale.checkpoint import CheckpointStore
from ganscale.checkpoint.files import SavedState, saved_state
from ganscale.storage import local
from tests.support.attempts import (
    FILES,
    HISTORY,
    HURRIED,
    MANIFEST,
    META,
    NEWER,
    NEXT,
    OLDER,
    TENSORS,
    TREE,
    attempt_at,
    background,
    go_on,
    newest,
    save,
    saved_at,
    state_at,
)
from tests.support.checkpoints import begin
from tests.support.processes import FORKED

PAGE_BYTES = 4096


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
    add = local._add

    def add_and_tell(path: Path, pieces: Any) -> None:
        if path.name in FILES:
            steps.append(path.name)
        add(path, pieces)

    monkeypatch.setattr(local, "_add", add_and_tell)
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
    with ProcessPoolExecutor(1, mp_context=FORKED) as pool:
        num_cuts = pool.submit(cut_files, tmp_path, step).result()
    assert num_cuts.pop("claim") > 2
    assert set(num_cuts) == set(FILES)
    assert min(num_cuts.values()) > LARGE_BYTES // 2 // step
