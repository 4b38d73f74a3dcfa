"""A value on one rank that is no number: all come to the same verdict, and the run ends well."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config
from ganscale.errors import TrainingFault
from ganscale.run_directory import RunDirectory
from ganscale.training import loop
from ganscale.training.build import load_shards
from ganscale.training.checkpoints import non_finite
from ganscale.training.inputs import HostInputs, PackedInputs
from ganscale.training.step_inputs import StepInputs
from ganscale.world import World
from tests.conftest import MakeConfig
from tests.support.ranks import run_ranks
from tests.support.runs import final_digest, read_rows

BAD_NIMG = 256


class Poisoned(loop.Trainer):
    """One image of rank 1 is not a number at one position, as often as `num_faults`."""

    num_faults = 1

    def step(self, host: HostInputs) -> None:
        unpack = self.inputs.unpack

        def poisoned(packed: PackedInputs) -> StepInputs:
            inputs = unpack(packed)
            if self.world.rank == 1 and self.state.nimg == BAD_NIMG and self.num_faults:
                self.num_faults -= 1
                inputs.batch.real_images[0, 0, 0, 0] = torch.nan
            return inputs

        with patch.object(self.inputs, "unpack", poisoned):
            super().step(host)


def _train_poisoned(world: World, config: Config, num_faults: int) -> tuple[str, int, float]:
    """(what ended it, rollbacks, learning rate at the end) on this rank."""
    shard_set = load_shards(config)
    Poisoned.num_faults = num_faults
    trainer = Poisoned(config, world, shard_set)
    try:
        trainer.run()
        ending = ""
    except TrainingFault as fault:
        ending = str(fault)
    finally:
        trainer.close()
    lr = float(trainer.state.method.models["G"].lr)
    return ending, trainer.checkpoints.num_rollbacks, lr


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(
        training__total_kimg=0.64,
        checkpoint__every_kimg=0.064,
        launch__num_workers=2,
        guard__policy="rollback",
        guard__rollback_lr_factor=0.5,
    )


def test_rollback_ends_in_a_healthy_run(config: Config) -> None:
    results = run_ranks(2, _train_poisoned, config, 1)
    lr = config.optimizer.lr.at(0) * 0.5
    assert results == [("", 1, lr)] * 2
    run_dir = RunDirectory(config.run_dir)
    events = read_rows(run_dir.events)
    (alarm,) = [e for e in events if e["event"] == "alarm"]
    assert (alarm["kind"], alarm["nimg"], alarm["healthy_nimg"], alarm["action"]) == (
        "non_finite",
        BAD_NIMG + 16,
        BAD_NIMG,
        "rollback",
    )
    (rollback,) = [e for e in events if e["event"] == "rollback"]
    assert (rollback["nimg"], rollback["num_rollbacks"], rollback["attempt"]) == (BAD_NIMG, 1, 2)
    rows = read_rows(run_dir.metrics)
    assert rows[-1]["nimg"] == 640
    (bad,) = [r for r in rows if r["train/loss_D"] is None]
    (good,) = [r for r in rows if r["nimg"] == bad["nimg"] and r["attempt"] == 2]
    assert good["train/loss_D"] is not None
    store = CheckpointStore(config.checkpoints)
    files = store.newest()
    assert files is not None
    assert files.name.nimg == 640
    assert non_finite(files.state()) is None


@pytest.mark.slow
def test_what_follows_a_rollback_is_not_what_came_before(config: Config) -> None:
    """The same weights, the same images, other latents."""
    clean = config.with_changes({"name": "clean", "guard.rollback_lr_factor": 1.0})
    run_ranks(2, _train_poisoned, clean, 0)
    run_ranks(2, _train_poisoned, config.with_changes({"guard.rollback_lr_factor": 1.0}), 1)
    rows = {r["nimg"]: r for r in read_rows(RunDirectory(clean.run_dir).metrics)}
    after = [r for r in read_rows(RunDirectory(config.run_dir).metrics) if r["attempt"] == 2]
    assert after[0]["nimg"] == BAD_NIMG + 16
    expected = rows[BAD_NIMG + 16]
    assert after[0]["train/real_logits"] == expected["train/real_logits"]
    assert after[0]["train/fake_logits"] != expected["train/fake_logits"]


@pytest.mark.slow
def test_a_fault_that_comes_again_ends_the_run_after_max_rollbacks(config: Config) -> None:
    results = run_ranks(2, _train_poisoned, config.with_changes({"guard.max_rollbacks": 2}), 99)
    endings = {ending for ending, _, _ in results}
    (ending,) = endings
    assert "after 2 rollbacks" in ending
    assert "256" not in ending or "0.256" in ending
    assert [num_rollbacks for _, num_rollbacks, _ in results] == [2, 2]


@pytest.mark.parametrize("policy", [pytest.param("warn", marks=pytest.mark.slow), "stop"])
def test_the_other_policies_note_it_and_go_on_or_end(config: Config, policy: str) -> None:
    other = config.with_changes({"guard.policy": policy, "guard.rollback_lr_factor": 1.0})
    results = run_ranks(2, _train_poisoned, other, 1)
    assert all(bool(ending) == (policy == "stop") for ending, _, _ in results)
    events = read_rows(RunDirectory(config.run_dir).events)
    (alarm,) = [e for e in events if e["event"] == "alarm"]
    assert alarm["action"] == policy
    assert final_digest(config)[0] == (640 if policy == "warn" else BAD_NIMG)
