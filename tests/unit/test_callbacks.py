"""Callbacks: when they are run, what they may do, and what a resumed run remembers of them."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import ganscale
from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config
from ganscale.errors import ConfigError, TrainingFault
from ganscale.run_directory import RunDirectory
from ganscale.tracking.history import History
from ganscale.training.build import build_state, load_shards
from ganscale.training.callbacks import Callback, Rollback
from ganscale.training.determinism import restoring_settings, use_deterministic_kernels
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


class PutMetric(Callback):
    """Puts a value into the next row after each step."""

    every_kimg = 0.001

    def __init__(self, value: Any) -> None:
        self.value = value

    def run(self, state: TrainingState) -> None:
        state.next_row["train/loss_D"] = self.value


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5)])
def test_a_metric_may_be_a_tensor_or_an_array_of_one_number(
    make_config: MakeConfig, value: Any
) -> None:
    # Checkpoints between rows hold what the next one will.
    config = make_config(
        training__total_kimg=0.064, tracking__log_every_kimg=0.032, checkpoint__every_kimg=0.016
    )
    ganscale.train(config, callbacks=[PutMetric(value)])
    rows = read_rows(RunDirectory(config.run_dir).metrics)
    assert [row["train/loss_D"] for row in rows] == [0.5, 0.5]


def _put_no_number(world: World, config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        train(config, world, callbacks=[PutMetric(torch.zeros(2))])
    return str(error.value)


def test_a_metric_that_is_no_number_is_refused_on_all_ranks(make_config: MakeConfig) -> None:
    config = make_config(launch__num_workers=2)
    first, second = run_ranks(2, _put_no_number, config)
    assert first == second
    assert "type Tensor into state.next_row['train/loss_D']" in first


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_another_policy_acts_on_an_alarm_that_is_up(make_config: MakeConfig, policy: str) -> None:
    config = make_config(training__total_kimg=0.032)
    ganscale.train(config, callbacks=[PutMetric(math.nan)])
    longer = config.with_changes({"training.total_kimg": 0.064})
    ganscale.train(longer, callbacks=[PutMetric(math.nan)])  # the same policy goes on
    again = config.with_changes(
        {"training.total_kimg": 0.096, "guard.policy": policy, "guard.max_rollbacks": 1}
    )
    # The sign is there from the first row on, so a rollback begins at nothing and meets it again.
    with pytest.raises(TrainingFault, match="the loss of D is nan"):
        ganscale.train(again, callbacks=[PutMetric(math.nan)])
    events = read_rows(RunDirectory(config.run_dir).events)
    alarms = [(e["nimg"], e["action"]) for e in events if e["event"] == "alarm"]
    expected = [(80, "stop")] if policy == "stop" else [(80, "rollback"), (16, "stop")]
    assert alarms == [(16, "warn"), *expected]


def test_a_callback_may_be_named_like_a_built_in_action(make_config: MakeConfig) -> None:
    class LogMetrics(CountRuns):
        """As that of `ganscale.training.actions`."""

    config = make_config(training__total_kimg=0.032)
    ganscale.train(config, callbacks=[LogMetrics()])
    ganscale.train(config.with_changes({"training.total_kimg": 0.064}))  # without it
    ganscale.train(config.with_changes({"name": "other"}), callbacks=[LogMetrics(), LogMetrics()])
    again = [LogMetrics(), LogMetrics()]
    ganscale.train(
        config.with_changes({"name": "other", "training.total_kimg": 0.064}), callbacks=again
    )
    assert [callback.count for callback in again] == [2, 2]


def test_what_an_older_version_saved_of_a_callback_is_loaded(make_config: MakeConfig) -> None:
    config = make_config()
    callback = CountRuns()
    with process_group(World()):
        trainer = Trainer(config, World(), load_shards(config), callbacks=[callback])
        try:
            state = trainer._state_dict()
            state["actions"] |= {"CountRuns": {"count": 7}}
            del state["callbacks"]
            trainer.checkpoints.save(0, state, step=0, metrics={}, healthy_nimg=0)
            trainer.checkpoints.finish()
            trainer._begin("resume")
        finally:
            trainer.close()
    assert callback.count == 7


def test_rollbacks_by_callbacks_have_a_limit(make_config: MakeConfig) -> None:
    class RollBackAlways(Callback):
        every_kimg = 0.016

        def run(self, state: TrainingState) -> None:
            if state.nimg == 64:
                raise Rollback(32)

    config = make_config(checkpoint__every_kimg=0.016, guard__max_rollbacks=2)
    with pytest.raises(TrainingFault, match=r"a callback asks to go back to 0.032 kimg, after 2"):
        ganscale.train(config, callbacks=[RollBackAlways()])
    attempts = CheckpointStore(config.checkpoints).attempts()
    assert [attempt.reason for attempt in attempts] == ["start", "rollback", "rollback"]


@pytest.mark.parametrize("every_kimg", [0, -1.0, math.nan])
def test_a_distance_that_is_none_is_refused_before_the_run_begins(
    make_config: MakeConfig, every_kimg: float
) -> None:
    callback, config = CountRuns(), make_config()
    callback.every_kimg = every_kimg
    with pytest.raises(ConfigError, match=r"CountRuns.every_kimg is .*must be above 0"):
        ganscale.train(config, callbacks=[callback])
    assert not RunDirectory(config.run_dir).config.exists()


class StopAt48(Callback):
    every_kimg = 0.016

    def run(self, state: TrainingState) -> None:
        state.stop_requested = state.nimg == 48


def test_a_callback_may_stop_the_run_which_can_be_resumed(make_config: MakeConfig) -> None:
    ganscale.train(make_config(name="whole"))
    config = make_config()
    result = ganscale.train(config, callbacks=[StopAt48()])
    assert (result.nimg, result.reason) == (48, "callback")
    assert final_digest(config)[0] == 48
    (stop,) = [e for e in read_rows(RunDirectory(config.run_dir).events) if e["event"] == "stop"]
    assert (stop["nimg"], stop["reason"]) == (48, "callback")
    assert ganscale.train(config).reason == ""
    assert final_digest(config) == final_digest(config.with_changes({"name": "whole"}))


def test_training_may_be_called_in_a_thread_and_leaves_torch_as_it_was(
    make_config: MakeConfig,
) -> None:
    threads = torch.get_num_threads()
    config = make_config(training__total_kimg=0.016, launch__threads_per_worker=1)
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(ganscale.train, config).result().nimg == 16
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_deterministic_kernels_end_with_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with restoring_settings():
        use_deterministic_kernels(torch.device("cuda"))
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fills  # type: ignore[attr-defined]
