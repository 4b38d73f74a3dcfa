"""Kill a run at a random step, start it again: the weights are those of a run left alone."""

from __future__ import annotations

import os
import random
import signal

import pytest

from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig
from tests.support.runs import final_digest, read_rows, start_ranks, wait_all, wait_for_rows


@pytest.mark.parametrize(
    ("world_size", "use_gpu"),
    [
        pytest.param(1, False, marks=pytest.mark.slow),
        (2, False),
        pytest.param(3, False, marks=pytest.mark.slow),
        # On a machine with one GPU both ranks share it.
        pytest.param(2, True, marks=pytest.mark.gpu),
    ],
)
def test_resumed_weights_are_bit_identical(
    make_config: MakeConfig, world_size: int, use_gpu: bool
) -> None:
    settings = {
        "launch__use_gpu": use_gpu,
        "training__total_kimg": 0.8,
        "checkpoint__every_kimg": 0.08,
        "samples__every_kimg": 0.24,
    }
    whole = make_config(name="whole", **settings)
    wait_all(start_ranks(whole, world_size))

    killed = make_config(name="killed", **settings)
    run_dir = RunDirectory(killed.run_dir)
    rng = random.Random(world_size)
    for kill in range(2):
        ranks = start_ranks(killed, world_size)
        rows = len(read_rows(run_dir.metrics))
        wait_for_rows(run_dir.metrics, rows + rng.randint(6, 18), ranks[0])
        for process in ranks:
            os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.communicate()
        events = [row["event"] for row in read_rows(run_dir.events)]
        assert "end" not in events
        assert events.count("resume") == kill
    wait_all(start_ranks(killed, world_size))

    assert final_digest(killed) == final_digest(whole)
    by_step = {row["step"]: row for row in read_rows(run_dir.metrics)}
    for expected in read_rows(RunDirectory(whole.run_dir).metrics):
        row = by_step[expected["step"]]
        for name in ("train/loss_D", "train/loss_G", "train/grad_norm_G"):
            assert row[name] == expected[name]
