"""Under Ray Train with two workers: the same weights as without Ray, through any kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from ganscale.config import Config
from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig
from tests.support.runs import final_digest, read_rows, start_ranks, wait_all, wait_for_rows


def _start_on_ray(config: Config) -> subprocess.Popen[str]:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    file = config.run_dir.parent / "ray.yaml"
    file.write_text(config.to_yaml())
    return subprocess.Popen(
        [sys.executable, "-m", "ganscale", "train", "--config", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_worker_and_killed_driver_change_nothing(make_config: MakeConfig) -> None:
    settings = {
        "training__total_kimg": 6.4,
        "checkpoint__every_kimg": 0.32,
        "launch__num_workers": 2,
    }
    expected = make_config(name="torchrun", **settings)
    wait_all(start_ranks(expected, 2))

    config = make_config(name="ray", launch__backend="ray", **settings)
    run_dir = RunDirectory(config.run_dir)
    driver = _start_on_ray(config)
    wait_for_rows(run_dir.metrics, 40, driver)
    started = next(row for row in read_rows(run_dir.events) if row["event"] == "start")
    os.kill(started["pid"], signal.SIGKILL)
    while not any(row["event"] == "resume" for row in read_rows(run_dir.events)):
        assert driver.poll() is None, driver.communicate()[1]
        time.sleep(0.1)
    rows = len(read_rows(run_dir.metrics))
    wait_for_rows(run_dir.metrics, rows + 40, driver)
    driver.kill()
    driver.communicate()
    assert not any(row["event"] == "end" for row in read_rows(run_dir.events))
    time.sleep(8)  # Ray's daemons notice that their driver is gone

    wait_all([_start_on_ray(config)])
    assert final_digest(config) == final_digest(expected)
    assert [r["event"] for r in read_rows(run_dir.events)].count("resume") == 2
