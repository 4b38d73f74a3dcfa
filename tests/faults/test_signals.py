"""SIGTERM and SIGINT: the step is finished, a checkpoint is durable, and the exit code says why."""

from __future__ import annotations

import os
import signal
import time

from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig
from tests.support.processes import Command
from tests.support.runs import final_digest, read_rows, start_ranks, wait_all, wait_for_rows


def end_of(processes: list[Command], timeout: float = 60) -> list[int | None]:
    for process in processes:
        process.communicate(timeout=timeout)
    return [process.returncode for process in processes]


def test_a_signal_to_one_rank_stops_all_at_a_checkpoint(make_config: MakeConfig) -> None:
    settings = {"training__total_kimg": 0.8, "checkpoint__every_kimg": 1000}
    whole = make_config(name="whole", **settings)
    wait_all(start_ranks(whole, 2))

    config = make_config(name="stopped", **settings)
    run_dir = RunDirectory(config.run_dir)
    ranks = start_ranks(config, 2)
    wait_for_rows(run_dir.metrics, 5, ranks[0])
    os.kill(ranks[1].pid, signal.SIGINT)
    time.sleep(0.01)
    os.kill(ranks[1].pid, signal.SIGTERM)  # as one: it comes with the first
    assert end_of(ranks) == [130, 130]
    (stop,) = [e for e in read_rows(run_dir.events) if e["event"] == "stop"]
    assert final_digest(config)[0] == stop["nimg"] < 800

    wait_all(start_ranks(config, 2))
    assert final_digest(config) == final_digest(whole)
    rows = {row["step"]: row for row in read_rows(run_dir.metrics)}
    expected = read_rows(RunDirectory(whole.run_dir).metrics)
    assert [rows[e["step"]]["train/loss_G"] for e in expected] == [
        e["train/loss_G"] for e in expected
    ]


def test_a_second_signal_ends_at_once_and_loses_no_older_checkpoint(
    make_config: MakeConfig,
) -> None:
    config = make_config(
        training__total_kimg=1.6, checkpoint__every_kimg=0.08, launch__grace_seconds=1000
    )
    run_dir = RunDirectory(config.run_dir)
    ranks = start_ranks(config, 2)
    wait_for_rows(run_dir.metrics, 12, ranks[0])
    os.kill(ranks[1].pid, signal.SIGSTOP)  # so that rank 0 cannot finish its step
    os.kill(ranks[0].pid, signal.SIGTERM)
    time.sleep(1)
    assert ranks[0].poll() is None
    os.kill(ranks[0].pid, signal.SIGTERM)
    _, errors = ranks[0].communicate(timeout=600)  # less than the grace time
    assert ranks[0].returncode == 143
    assert "second signal" in errors
    ranks[1].kill()
    ranks[1].communicate()
    assert final_digest(config)[0] >= 160


def test_the_grace_time_ends_what_cannot_finish(make_config: MakeConfig) -> None:
    config = make_config(training__total_kimg=1.6, launch__grace_seconds=1.5)
    ranks = start_ranks(config, 2)
    wait_for_rows(RunDirectory(config.run_dir).metrics, 5, ranks[0])
    os.kill(ranks[1].pid, signal.SIGSTOP)
    os.kill(ranks[0].pid, signal.SIGTERM)
    began = time.monotonic()
    _, errors = ranks[0].communicate(timeout=600)
    assert time.monotonic() - began > 1
    assert ranks[0].returncode == 143
    assert "no end within 1.5 s" in errors
    ranks[1].kill()
    ranks[1].communicate()
