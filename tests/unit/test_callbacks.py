"""Callbacks: when they are run, what they may do, and what a resumed run remembers of them."""

from __future__ import annotations

from typing import Any

import pytest

import ganscale
from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config
from ganscale.errors import ConfigError, TrainingFault
from ganscale.run_directory import RunDirectory
from ganscale.training.build import build_state
from ganscale.training.callbacks import Callback, Rollback
from ganscale.training.loop import train
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
