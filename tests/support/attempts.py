"""Attempts that write small checkpoints, and whether a run goes on from what they leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ganscale.checkpoint import BackgroundWriter, CheckpointName, CheckpointStore, Retention
from ganscale.checkpoint.files import SavedState, saved_state
from ganscale.storage import RetryPolicy
from tests.support.checkpoints import begin, bits

OLDER, NEWER, NEXT = 1000, 2000, 3000
NEWEST_ONLY = Retention(keep_last=1)
TENSORS, TREE, META, HISTORY = "state.safetensors", "state.json", "meta.json", "metrics.jsonl"
MANIFEST = "manifest.json"
FILES = (TENSORS, TREE, META, HISTORY, MANIFEST)
"""In the order in which they are written."""
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
    assert seen.backend.files() == sorted([*claims, *(f"{name}/{file}" for file in FILES)])
    return start.nimg
