"""A process killed between any two system calls of claim, write and prune loses nothing."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ganscale.checkpoint import CheckpointStore, Retention
from ganscale.checkpoint.files import saved_state
from tests.support.processes import FORKED
from tests.support.syscalls import run_until_call

OLDER, BEFORE, AFTER, NEXT = 1000, 2000, 3000, 4000
NEWEST_ONLY = Retention(keep_last=1)
SOME = 10
FILES = ("manifest.json", "meta.json", "metrics.jsonl", "state.json", "state.safetensors")

Contents = tuple[tuple[str, bytes | None], ...]


def state_at(nimg: int) -> dict[str, Any]:
    weight = torch.arange(nimg, nimg + 5000, dtype=torch.float32)
    return {"weight": weight, "nimg": nimg, "lr": [0.1, None]}


def attempt_at(store: CheckpointStore, *positions: int) -> None:
    """One attempt that goes on from the newest, writes some checkpoints, and prunes."""
    attempt, _ = store.claim(store.newest)
    for nimg in positions:
        store.write(attempt, saved_state(nimg, state_at(nimg), {}, history=b"{}\n"))
    if attempt.number > 1:
        store.prune(attempt, NEWEST_ONLY)


def victim(root: Path) -> None:
    with mock.patch.object(secrets, "token_hex", return_value="the same each time"):
        attempt_at(CheckpointStore(root), AFTER)


def contents(root: Path) -> Contents:
    """All that is there: files with their bytes, folders with None."""
    paths = sorted(root.rglob("*"))
    return tuple((str(p.relative_to(root)), None if p.is_dir() else p.read_bytes()) for p in paths)


def check(root: Path) -> int:
    """The position a run goes on from, after a kill; and that it can, without a trace of it."""
    store = CheckpointStore(root)
    assert [store.verify(name) for name in store.names()] == [None] * len(store.names())
    files = store.newest()
    assert files is not None
    found = files.name.nimg
    assert found in (BEFORE, AFTER)
    state, expected = files.state(), state_at(found)
    assert torch.equal(state.pop("weight"), expected.pop("weight"))
    assert state == expected

    attempt_at(store, NEXT)
    claims = sorted(path.name for path in (root / "attempts").iterdir())
    assert claims == [f"a{number:04d}.json" for number in range(1, len(claims) + 1)]
    (name,) = store.names()
    assert (name.nimg, name.attempt) == (NEXT, len(claims))
    assert store.verify(name) is None
    left = {path for path, _ in contents(root)} - {f"attempts/{claim}" for claim in claims}
    assert left == {"attempts", str(name), *(f"{name}/{file}" for file in FILES)}
    assert json.loads((root / "attempts" / claims[-1]).read_text())["start"].startswith(
        f"nimg-{found:012d}"
    )
    return found


def kill_before_calls(folder: Path, all_of_them: bool) -> tuple[int, list[int]]:
    """(number of kills, the position gone on from after each different state of the disk)."""
    warnings.simplefilter("error")
    template = folder / "template"
    attempt_at(CheckpointStore(template), OLDER, BEFORE)
    # Once here, so that all that is imported late is, and every child makes the same calls.
    shutil.copytree(template, folder / "whole")
    victim(folder / "whole")
    assert check(folder / "whole") == AFTER
    numbers, states = calls_and_states(template, folder / "watched")
    if not all_of_them:
        numbers = sorted({*first_of_each(states), *numbers[::SOME], numbers[-1]})
    found: dict[Contents, int] = {}

    def note(root: Path, killed: str) -> None:
        state = contents(root)
        if state not in found:
            try:
                found[state] = check(root)
            except Exception as error:
                files = [f"{path} {'' if b is None else len(b)}" for path, b in state]
                error.add_note(f"{killed}, which left {files}")
                raise
        shutil.rmtree(root)

    for number in numbers:
        root = folder / "run"
        shutil.copytree(template, root)
        run_until_call(lambda root=root: victim(root), number)  # type: ignore[misc]
        note(root, f"killed before call {number}")
    # A busy machine may add calls that change nothing, so that a kill comes a little early.
    for state in states:
        if state not in found:
            lay_out(folder / "run", state)
            note(folder / "run", "seen before a call")
    return len(numbers), [found[state] for state in dict.fromkeys(states)]


def lay_out(root: Path, state: Contents) -> None:
    """The opposite of `contents`."""
    root.mkdir()
    for path, data in state:
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def calls_and_states(template: Path, root: Path) -> tuple[list[int], list[Contents]]:
    """The numbers of all calls, one more for the end, and what is on the disk before each."""
    shutil.copytree(template, root)
    states: list[Contents] = []
    assert not run_until_call(
        lambda: victim(root), math.inf, lambda *_: states.append(contents(root))
    )
    states.append(contents(root))
    return list(range(1, len(states) + 1)), states


def first_of_each(states: list[Contents]) -> list[int]:
    """Numbers of the calls before which the disk is not as it was before the last call."""
    return [n for n in range(1, len(states) + 1) if n == 1 or states[n - 1] != states[n - 2]]


@pytest.mark.parametrize("all_of_them", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_kill_between_any_two_system_calls_loses_nothing(
    tmp_path: Path, all_of_them: bool
) -> None:
    """All that a kill leaves is the disk: one kill for each state that it may be in, and more."""
    # A fresh process: few threads, and nothing that other tests have opened.
    with ProcessPoolExecutor(1, mp_context=FORKED) as pool:
        job = pool.submit(kill_before_calls, tmp_path, all_of_them)
        num_kills, positions = job.result()
    assert num_kills > (200 if all_of_them else 50)
    assert len(positions) > 20
    # In the order of the calls: the older one until the newer one is there, and never again.
    assert positions == sorted(positions)
    assert set(positions) == {BEFORE, AFTER}


def test_the_kill_falls_between_the_calls(tmp_path: Path) -> None:
    def four_calls() -> None:
        os.mkdir(tmp_path / "first")
        os.mkdir(tmp_path / "second")
        os.rmdir(tmp_path / "first")
        os.mkdir(tmp_path / "third")

    states = []
    for number in range(1, 7):
        killed = run_until_call(four_calls, number)
        states.append((killed, sorted(path.name for path in tmp_path.iterdir())))
        for path in tmp_path.iterdir():
            path.rmdir()
    whole = ["second", "third"]
    assert states[:4] == [
        (True, []),
        (True, ["first"]),
        (True, ["first", "second"]),
        (True, ["second"]),
    ]
    assert states[-1] == (False, whole)


def test_an_error_of_the_function_is_not_taken_for_a_kill(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def wrong() -> None:
        raise ValueError("what went wrong")

    with pytest.raises(RuntimeError, match="raised"):
        run_until_call(wrong, 10_000)
    assert "what went wrong" in capfd.readouterr().err
