"""Notices a step that hangs or crawls, says which rank the others wait for, and where that rank is.

In a collective everybody waits for the slowest, so all ranks look alike from outside. Each rank
tells the others through the group's store how far it is: the training thread writes its phase to a
field, a second thread sends it on once a second, and listens to the others once its own step is
slow. When a step takes too long, whoever is behind, or has fallen silent, is named in
`events.jsonl` (in the log, where that is rank 0, which writes the events), and every rank that can
writes the stacks of its threads to `stacks/`. Nothing is ended here, but by the group's time-out.
"""

from __future__ import annotations

import faulthandler
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ganscale.world import World

Phase = Literal[
    "start",
    "evaluation",
    "write",
    "data",
    "step",
    "discriminator",
    "autoencoder",
    "encoder",
    "generator",
    "generator and encoder",
    "average",
]
"""What a rank does in a step, in this order. A step that is replayed as a graph is one phase,
"step"; else a method has some of the others."""

PHASES: tuple[Phase, ...] = get_args(Phase)

_SILENT_BEATS = 5
"""A rank whose beat has not changed in as many of ours has fallen silent."""


@dataclass(frozen=True)
class RankProgress:
    """How far a rank is; `number` grows with each beat, so that silence is seen."""

    rank: int
    number: int
    step: int
    phase: Phase
    host: str

    @property
    def progress(self) -> tuple[int, int]:
        """Comparable between ranks."""
        return self.step, PHASES.index(self.phase)


def laggards(beats: list[RankProgress], silent: set[int]) -> list[int]:
    """The ranks that the others wait for: those that fell silent, else those behind the rest.

    When all are in the same phase of the same step, it is all of them: the stacks say more.
    """
    if silent:
        return sorted(silent)
    behind = min(beat.progress for beat in beats)
    return sorted(beat.rank for beat in beats if beat.progress == behind)


class Watchdog:
    """Watches one rank's steps while the block runs.

    Args:
        world: this rank among the others.
        folder: where stacks are written.
        stall_seconds: a step that takes longer is reported, once.
        report: takes the fields of the event, on the lowest rank that is not hanging itself.
        host: this machine's name, for people.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        *,
        stall_seconds: float,
        report: Callable[..., None],
        host: str,
    ) -> None:
        self._world = world
        self._folder = folder
        self._stall_seconds = stall_seconds
        self._report = report
        self._host = host
        # At least twenty beats before a stall, so that five missing ones are noticed in good time.
        self._interval = min(1.0, stall_seconds / 20)
        # Assigned whole by the training thread and read by the others: a tuple is never seen half
        # changed, so a lock, which a hanging thread could hold, is not needed.
        self._at: tuple[int, Phase, float] = (0, "start", time.monotonic())
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._answered = time.monotonic()
        self._beats: dict[int, RankProgress] = {}
        self._unchanged: dict[int, int] = {}
        # The group's own store, since a collective cannot be used to ask who does not answer in a
        # collective.
        self._store = PrefixStore("ganscale/watchdog", _get_default_store())
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._beat, "heartbeat"), (self._watch, "watchdog"))
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The heartbeat may hang in a store that is gone; it is a daemon and is left."""
        self._stop.set()
        self._threads[1].join()
        self._threads[0].join(2 * self._interval)

    def mark(self, step: int, phase: Phase) -> None:
        """The training thread enters a phase; a new step starts the clock again."""
        if step != self._at[0]:
            self.alive()
        self._at = (step, phase, time.monotonic())

    def alive(self) -> None:
        """The training thread is at work on something that may take longer than a step."""
        self._began = time.monotonic()
        self._unchanged.clear()

    def _beat(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            step, phase, _ = self._at
            beat = RankProgress(self._world.rank, number, step, phase, self._host)
            try:
                self._store.set(str(self._world.rank), json.dumps(asdict(beat)))
                # Listening costs a request for each rank, which is spent only when something looks
                # wrong.
                if time.monotonic() - self._began > self._stall_seconds / 2:
                    for rank in range(self._world.world_size):
                        self._receive(rank)
            except RuntimeError:  # the store's rank is gone; silence says so
                return
            self._answered = time.monotonic()
            self._stop.wait(self._interval)

    def _receive(self, rank: int) -> None:
        # `get` waits for a key that is not there yet.
        if not self._store.check([str(rank)]):
            return
        beat = RankProgress(**json.loads(self._store.get(str(rank))))
        same = rank in self._beats and self._beats[rank].number == beat.number
        self._unchanged[rank] = self._unchanged.get(rank, 0) + 1 if same else 0
        self._beats[rank] = beat

    def _watch(self) -> None:
        reported = -1
        while not self._stop.wait(self._interval):
            step, _, _ = self._at
            seconds = time.monotonic() - self._began
            if seconds > self._stall_seconds and step != reported:
                reported = step
                # A full disk, say, must not keep the stall from being reported.
                with suppress(OSError):
                    self._dump_stacks(step)
                self._report_stall(step, seconds)

    def _dump_stacks(self, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{step:09d}-rank-{self._world.rank}.txt"
        with path.open("w") as file:
            file.write(f"rank {self._world.rank} on {self._host}, step {step}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _report_stall(self, step: int, seconds: float) -> None:
        # A copy, as the other threads change it meanwhile.
        unchanged = self._unchanged.copy()
        silent = {rank for rank, count in unchanged.items() if count >= _SILENT_BEATS}
        silent -= {self._world.rank}
        patience = _SILENT_BEATS * self._interval
        if self._world.rank and time.monotonic() - self._answered > patience:
            silent = {0}  # which holds the store
        # One report for a stall: from the lowest rank that can still speak.
        able = [r for r in range(self._world.world_size) if r not in silent]
        if self._world.rank != min(able, default=0):
            return
        mine = RankProgress(self._world.rank, 0, self._at[0], self._at[1], self._host)
        beats = list({**self._beats, self._world.rank: mine}.values())
        waited_for = laggards(beats, silent)
        told_by = f"rank {self._world.rank} on {self._host}"
        fields = _fields(step, seconds, beats, waited_for, silent)
        self._report(**fields, stacks=str(self._folder), told_by=told_by)


def _fields(
    step: int,
    seconds: float,
    beats: list[RankProgress],
    waited_for: list[int],
    silent: set[int],
) -> dict[str, Any]:
    by_rank = {beat.rank: beat for beat in beats}
    where = {
        str(rank): {
            "step": by_rank[rank].step,
            "phase": by_rank[rank].phase,
            "host": by_rank[rank].host,
            "silent": rank in silent,
        }
        for rank in waited_for
        if rank in by_rank
    }
    return {
        "step": step,
        "seconds": round(seconds, 1),
        "ranks": waited_for,
        "where": where,
    }
