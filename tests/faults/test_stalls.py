"""A rank that hangs is named, with where it is, and no rank waits longer than the time-out."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from ganscale.config import Config
from ganscale.data.reader import Batch
from ganscale.run_directory import RunDirectory
from ganscale.training import loop
from ganscale.training.build import load_shards
from ganscale.training.watchdog import Phase, RankProgress, Watchdog, laggards
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.ranks import run_ranks
from tests.support.runs import read_rows, start_ranks, wait_for_rows


def beat(rank: int, step: int, phase: Phase) -> RankProgress:
    return RankProgress(rank, number=1, step=step, phase=phase, host="here")


def test_who_is_behind_or_silent_is_waited_for() -> None:
    beats = [beat(0, 7, "discriminator"), beat(1, 7, "data"), beat(2, 7, "generator")]
    assert laggards(beats, silent=set()) == [1]
    assert laggards(beats, silent={2}) == [2]
    assert laggards([*beats, beat(3, 6, "generator")], silent=set()) == [3]
    encoding = [beat(0, 7, "discriminator"), beat(1, 7, "autoencoder")]
    assert laggards(encoding, silent=set()) == [0]
    same = [beat(0, 7, "discriminator"), beat(1, 7, "discriminator")]
    assert laggards(same, silent=set()) == [0, 1]


def test_a_stall_is_reported_where_stacks_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("a file where the folder should be")
    stalls: list[dict[str, Any]] = []
    reported = threading.Event()

    def report(**fields: Any) -> None:
        stalls.append(fields)
        reported.set()

    with process_group(World()):
        watchdog = Watchdog(
            World(), tmp_path / "stacks", stall_seconds=0.1, report=report, host="here"
        )
        with watchdog:
            assert reported.wait(100)
    assert (stalls[0]["step"], stalls[0]["ranks"]) == (0, [0])


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_the_others_end_at_the_time_out(
    make_config: MakeConfig, stopped: int
) -> None:
    config = make_config(
        training__total_kimg=16, launch__stall_seconds=2, launch__timeout_seconds=8
    )
    run_dir = RunDirectory(config.run_dir)
    ranks = start_ranks(config, 2)
    wait_for_rows(run_dir.metrics, 10, ranks[0])
    os.kill(ranks[stopped].pid, signal.SIGSTOP)
    other = ranks[1 - stopped]
    _, errors = other.communicate(timeout=600)
    assert other.returncode == 1
    assert "ganscale:" in errors
    ranks[stopped].kill()
    ranks[stopped].communicate()
    path = run_dir.stacks
    assert [p.name.rpartition("-")[2] for p in path.glob("*.txt")] == [f"{1 - stopped}.txt"]
    if stopped:  # the events are rank 0's, which may be the one that hangs
        (stall,) = [e for e in read_rows(run_dir.events) if e["event"] == "stall"]
        assert stall["ranks"] == [1]
        assert stall["where"]["1"]["silent"]


class Sleeper(loop.Trainer):
    """Rank 1 sleeps once where it reads."""

    def _begin_to_doze(self) -> None:
        time.sleep(4)

    def slowly(self, nimg: int, batch_size: int) -> Generator[Batch]:
        """The reader's batches, one of which comes late on rank 1."""
        for number in itertools.count():
            if number == 5 and self.world.rank == 1:
                self._begin_to_doze()
            yield self.reader.read(nimg + number * batch_size, batch_size)


def _train_asleep(world: World, config: Config) -> None:
    trainer = Sleeper(config, world, load_shards(config))
    try:
        with patch.object(trainer.reader, "batches", trainer.slowly):
            trainer.run()
    finally:
        trainer.close()


def test_a_rank_that_is_slow_to_read_is_named_with_its_stack(make_config: MakeConfig) -> None:
    config = make_config(launch__num_workers=2, launch__stall_seconds=2)
    run_ranks(2, _train_asleep, config)
    run_dir = RunDirectory(config.run_dir)
    events = read_rows(run_dir.events)
    (stall,) = [e for e in events if e["event"] == "stall"]
    assert (stall["ranks"], stall["where"]["1"]["phase"]) == ([1], "data")
    assert not stall["where"]["1"]["silent"]
    (stack,) = Path(stall["stacks"]).glob("*-rank-1.txt")
    assert "_begin_to_doze" in stack.read_text()
    assert events[-1]["event"] == "end"
