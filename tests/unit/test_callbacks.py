"""Callbacks: when they are run, what they may do, and what a resumed run remembers of them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import ganscale
from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config
from ganscale.errors import ConfigError, TrainingFault
from ganscale.run_directory import RunDirectory
from ganscale.tracking.history import History
from ganscale.training.build import build_state, load_shards
from ganscale.training.callbacks import Callback, Rollback
from ganscale.training.loop import Trainer, train
from ganscale.training.precision import Precision
from ganscale.training.state import TrainingState
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.ranks import run_ranks
from tests.support.runs import final_digest, read_rows


class CountRuns(Callback):
    """Logs how often it was run, and notes where."""

    every_kimg = 0.032

    def __init__(self) -> None:
        self.count = 0
        self.positions: list[int] = []

    def run(self, state: TrainingState) -> None:
        self.count += 1
        self.positions.append(state.nimg)
        state.next_row["train/count"] = self.count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class RollBackOnce(Callback):
    """Asks for a rollback at one position, once."""

    every_kimg = 0.016

    def __init__(self, healthy_nimg: int) -> None:
        self.healthy_nimg = healthy_nimg
        self.done = False

    def run(self, state: TrainingState) -> None:
        if state.nimg == 96 and not self.done:
            self.done = True
            raise Rollback(self.healthy_nimg)


class Interruption(Exception):
    """Ends a run without a checkpoint."""


class Interrupt(Callback):
    """Ends the run at one position."""

    every_kimg = 0.016

    def run(self, state: TrainingState) -> None:
        if state.nimg == 112:
            raise Interruption


def test_callbacks_are_run_by_position_and_remember_across_a_resume(
    make_config: MakeConfig,
) -> None:
    first, second = CountRuns(), CountRuns()
    config = make_config(training__total_kimg=0.08)  # not a multiple of 32: once more at the end
    ganscale.train(config, callbacks=[first])
    ganscale.train(config.with_changes({"training.total_kimg": 0.16}), callbacks=[second])
    assert first.positions == [32, 64, 80]
    assert second.positions == [96, 128, 160]
    rows = read_rows(RunDirectory(config.run_dir).metrics)
    counts = {row["nimg"]: row["train/count"] for row in rows if "train/count" in row}
    assert counts == {32: 1, 64: 2, 80: 3, 96: 4, 128: 5, 160: 6}


def test_a_callback_may_ask_for_a_rollback(make_config: MakeConfig) -> None:
    config = make_config(checkpoint__every_kimg=0.032)
    ganscale.train(config, callbacks=[RollBackOnce(healthy_nimg=64)])
    (rollback,) = [
        e for e in read_rows(RunDirectory(config.run_dir).events) if e["event"] == "rollback"
    ]
    assert (rollback["nimg"], rollback["num_rollbacks"]) == (64, 1)
    assert final_digest(config)[0] == 160


def test_a_run_that_is_ended_at_its_checkpoint_has_all_that_an_end_has(
    make_config: MakeConfig,
) -> None:
    settings = {"checkpoint__every_kimg": 0.08, "checkpoint__snapshot_every_kimg": 0.16}
    config = make_config(**settings)
    run_dir = RunDirectory(config.run_dir)
    ganscale.train(make_config(name="whole", training__total_kimg=0.08, **settings))
    with pytest.raises(Interruption):
        ganscale.train(config, callbacks=[Interrupt()])
    assert not run_dir.snapshot(80, "").exists()
    shorter, again = CountRuns(), CountRuns()
    config = config.with_changes({"training.total_kimg": 0.08})
    ganscale.train(config, callbacks=[shorter])
    assert shorter.positions == [80]
    assert run_dir.snapshot(80, "").exists()
    assert run_dir.sample_grid(80).exists()
    assert History.read(run_dir).series("train/count") == [(80, 1)]
    assert final_digest(config) == final_digest(config.with_changes({"name": "whole"}))
    # It has had its end, so another start does nothing.
    ganscale.train(config, callbacks=[again])
    assert again.positions == []


def test_a_key_that_a_callback_misses_is_not_taken_for_another_version(
    make_config: MakeConfig,
) -> None:
    class Forgetful(CountRuns):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("mine")

    config = make_config(training__total_kimg=0.032)
    ganscale.train(config, callbacks=[Forgetful()])
    with pytest.raises(KeyError, match="mine"):
        ganscale.train(config, callbacks=[Forgetful()])


def test_a_store_that_is_away_between_checkpoints_ends_no_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        samples__every_kimg=0.032, checkpoint__snapshot_every_kimg=0.032, training__total_kimg=0.096
    )
    with process_group(World()):
        trainer = Trainer(config, World(), load_shards(config))
        assert trainer.checkpoints.store is not None
        backend = trainer.checkpoints.store.backend
        exists = backend.exists
        failures = []

        def flaky(file: str) -> bool:
            # For the training thread; the writer has a policy of its own.
            if threading.current_thread() is threading.main_thread():
                failures.append(file)
                raise OSError("connection reset")
            return exists(file)

        monkeypatch.setattr(backend, "exists", flaky)
        try:
            trainer.run()
        finally:
            trainer.close()
    assert len(failures) == 7  # four grids and three snapshots
    assert final_digest(config)[0] == 96


def _roll_back_too_far(world: World, config: Config) -> str:
    with pytest.raises(TrainingFault) as fault:
        train(config, world, callbacks=[RollBackOnce(healthy_nimg=8)])
    return str(fault.value)


def test_a_rollback_without_a_checkpoint_to_go_back_to_ends_the_run_and_deletes_nothing(
    make_config: MakeConfig,
) -> None:
    config = make_config(
        launch__num_workers=2, checkpoint__every_kimg=0.016, checkpoint__keep_last=2
    )
    faults = run_ranks(2, _roll_back_too_far, config)
    assert [fault.partition(" in ")[0] for fault in faults] == [
        "a rollback finds no checkpoint up to 0.008 kimg"
    ] * 2
    store = CheckpointStore(config.checkpoints)
    assert [attempt.reason for attempt in store.attempts()] == ["start"]
    # At 16 the rule of diversity looked last.
    assert [name.nimg for name in store.lineage()] == [80, 64, 16]


def test_callbacks_are_refused_where_workers_are_other_processes(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="set launch.backend=inprocess"):
        ganscale.train(make_config(launch__backend="ray"), callbacks=[CountRuns()])


def test_a_callback_at_the_start_is_run_before_the_first_step(make_config: MakeConfig) -> None:
    world = World()
    config = make_config()
    with process_group(world):
        state = build_state(config, Precision.resolve("fp32", world.torch_device), world)
    late, early = Callback(), Callback()
    early.at_start = True
    assert (late.is_due(state), early.is_due(state)) == (False, True)
    state.advance(999)
    assert not late.is_due(state)
    state.advance(1)
    assert late.is_due(state)
