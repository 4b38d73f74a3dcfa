"""The power fails while a checkpoint is written: the disk has lost what was not synced."""

from __future__ import annotations

import os
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from ganscale.checkpoint import CheckpointStore
from tests.faults.test_checkpoint_kills import (
    AFTER,
    BEFORE,
    NEXT,
    OLDER,
    attempt_at,
    lay_out,
    state_at,
    victim,
)
from tests.support.power_loss import Tree, states_after_power_loss
from tests.support.processes import FORKED


def newest_position(root: Path) -> int:
    """Where a run goes on from on a disk in this state; and that it can go on."""
    store = CheckpointStore(root)
    with warnings.catch_warnings():
        # Of an older checkpoint whose removal has come to the disk in part.
        warnings.simplefilter("ignore")
        files = store.newest()
        assert files is not None, "no checkpoint is left"
        found = files.name.nimg
        state, expected = files.state(), state_at(found)
        assert torch.equal(state.pop("weight"), expected.pop("weight"))
        assert state == expected
        attempt_at(store, NEXT)
        assert store.verify(store.lineage()[0]) is None
        assert store.lineage()[0].nimg == NEXT
    return found


def positions_after_power_loss(folder: Path) -> list[list[int]]:
    """For each system call: where runs go on from after a crash just before it."""
    template = folder / "template"
    attempt_at(CheckpointStore(template), OLDER, BEFORE)
    shutil.copytree(template, folder / "imported")
    victim(folder / "imported")  # so that what is imported late is imported
    root = folder / "run"
    shutil.copytree(template, root)
    found: dict[Tree, int] = {}
    positions = []
    for states in states_after_power_loss(lambda: victim(root), root):
        for state in states:
            if state not in found:
                lay_out(folder / "disk", state)
                try:
                    found[state] = newest_position(folder / "disk")
                except BaseException as error:
                    files = [f"{path} {'' if data is None else len(data)}" for path, data in state]
                    error.add_note(f"on a disk that has {files}")
                    raise
                shutil.rmtree(folder / "disk")
        positions.append([found[state] for state in states])
    assert len(found) > 50
    return positions


def test_the_newest_durable_checkpoint_is_there_whatever_the_disk_has_lost(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=FORKED) as pool:
        positions = pool.submit(positions_after_power_loss, tmp_path).result()
    assert {BEFORE, AFTER} == {found for each in positions for found in each}
    # The first of each is of a disk with nothing but what was synced. From the moment on at which
    # that has the new checkpoint, no crash loses it.
    durable = next(n for n, each in enumerate(positions) if each[0] == AFTER)
    assert {found for each in positions[durable:] for found in each} == {AFTER}
    # Before it is claimed and written nothing of it can be found.
    assert positions[0] == [BEFORE]


def test_what_was_not_synced_is_lost_and_a_rename_is_whole(tmp_path: Path) -> None:
    """A file that is renamed without having been synced may be empty; one that was may not."""

    def write(name: str, data: bytes, *, sync: bool) -> None:
        with (tmp_path / f".{name}").open("wb", buffering=0) as file:
            file.write(data)
            if sync:
                os.fsync(file.fileno())
        os.rename(tmp_path / f".{name}", tmp_path / name)

    def action() -> None:
        write("synced", b"whole", sync=True)
        write("hasty", b"whole", sync=False)
        descriptor = os.open(tmp_path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    states = states_after_power_loss(action, tmp_path)
    everything = {state for each in states for state in each}
    contents = {path: {dict(s)[path] for s in everything if path in dict(s)} for path in
                ("synced", "hasty", ".synced")}  # fmt: skip
    assert contents["synced"] == {b"whole"}
    assert contents["hasty"] == {b"", b"wh", b"whole"}
    assert b"" in contents[".synced"]
    assert () in everything  # no name is there for sure before the folder is synced
    assert dict(states[-1][0]).keys() == {"synced", "hasty"}
