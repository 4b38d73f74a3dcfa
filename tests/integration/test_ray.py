"""Under Ray Train with two workers: the same weights as without Ray, through any kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config
from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig
from tests.support.ranks import free_port
from tests.support.runs import (
    final_digest,
    own_ray,
    read_rows,
    start_ranks,
    wait_all,
    wait_for_rows,
)

Start = Callable[[Config], subprocess.Popen[str]]

SETTINGS = {
    "training__total_kimg": 3.2,
    "checkpoint__every_kimg": 0.32,
    "launch__num_workers": 2,
}


@pytest.fixture
def start() -> Iterator[Start]:
    """`ganscale train` with a Ray of its own."""
    with own_ray() as start_driver:

        def start_with(config: Config) -> subprocess.Popen[str]:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            file = config.run_dir.parent / "ray.yaml"
            file.write_text(config.to_yaml())
            return start_driver("train", "--config", str(file))

        yield start_with


def _wait(what: Callable[[], object], driver: subprocess.Popen[str], timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


def _attempts(config: Config) -> int:
    return len(CheckpointStore(config.checkpoints).attempts())


def _events(config: Config) -> list[dict[str, Any]]:
    return read_rows(RunDirectory(config.run_dir).events)


def _trains_again(config: Config, attempts: int, driver: subprocess.Popen[str]) -> None:
    """Wait until an attempt beyond `attempts` has logged a few rows."""
    metrics = RunDirectory(config.run_dir).metrics
    _wait(lambda: sum(row["attempt"] > attempts for row in read_rows(metrics)) > 5, driver)


def _controller(driver: subprocess.Popen[str]) -> psutil.Process:
    for process in psutil.Process(driver.pid).children(recursive=True):
        if "TrainController" in " ".join(process.cmdline()):
            return process
    raise AssertionError("no controller")


@pytest.fixture
def expected(make_config: MakeConfig) -> Config:
    """The same run without Ray and without a fault, which has ended."""
    config = make_config(name="torchrun", **SETTINGS)
    wait_all(start_ranks(config, 2))
    return config


def _stop_and_compare(driver: subprocess.Popen[str], config: Config, expected: Config) -> None:
    """The driver is told to stop and leaves a checkpoint, from which the run comes to its end."""
    driver.terminate()
    _, errors = driver.communicate(timeout=600)
    assert driver.returncode == 143, errors
    (stop,) = [row for row in _events(config) if row["event"] == "stop"]
    assert final_digest(config)[0] == stop["nimg"] < config.total_nimg
    wait_all(start_ranks(config.with_changes({"launch.backend": "inprocess"}), 2))
    assert final_digest(config) == final_digest(expected)


@pytest.mark.timeout(900)  # far less on a quiet machine
def test_a_killed_worker_and_a_stop_change_nothing(
    make_config: MakeConfig, start: Start, expected: Config
) -> None:
    config = make_config(name="ray", launch__backend="ray", **SETTINGS)
    driver = start(config)
    wait_for_rows(RunDirectory(config.run_dir).metrics, 25, driver)
    started = next(row for row in _events(config) if row["event"] == "start")
    os.kill(started["pid"], signal.SIGKILL)
    _trains_again(config, 1, driver)
    (fault,) = [row for row in _events(config) if row["event"] == "fault"]
    assert fault["message"] == "rank 0 is gone"
    _stop_and_compare(driver, config, expected)


@pytest.mark.slow  # the soak of kills does this at random moments
@pytest.mark.timeout(1200)
def test_a_killed_controller_and_a_killed_driver_change_nothing(
    make_config: MakeConfig, start: Start, expected: Config
) -> None:
    config = make_config(name="ray", launch__backend="ray", **SETTINGS)
    driver = start(config)
    wait_for_rows(RunDirectory(config.run_dir).metrics, 25, driver)
    _controller(driver).kill()
    _trains_again(config, 1, driver)

    driver.kill()
    driver.wait()
    # What Ray keeps of a run, cut short: read, it would end every later start.
    folder = config.run_dir / "ray" / config.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_re')
    attempts = _attempts(config)
    driver = start(config)
    _trains_again(config, attempts, driver)
    _stop_and_compare(driver, config, expected)


@pytest.mark.slow  # test_supervisor has the rule, without a cluster
def test_an_error_that_would_come_again_is_told_once(make_config: MakeConfig, start: Start) -> None:
    """A value that is no number with guard.policy=stop: no restart helps."""
    config = make_config(
        launch__backend="ray",
        guard__policy="stop",
        optimizer__lr=1e30,
        training__total_kimg=3.2,
    )
    driver = start(config)
    _, errors = driver.communicate(timeout=600)
    assert driver.returncode == 1
    assert "ganscale: training failed on rank 0: stopped at" in errors
    assert _attempts(config) == 1


class Cluster:
    """A Ray cluster of nodes on this machine, with one CPU each. Its head is there at once."""

    def __init__(self, folder: Path) -> None:
        self._environment = {
            **os.environ,
            "RAY_TMPDIR": str(folder),
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
        }
        self._nodes: list[subprocess.Popen[str]] = []
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self._start("--head", f"--port={port}", "--include-dashboard=false")

    def add_node(self) -> None:
        """Another node joins."""
        self._start(f"--address={self.address}")

    def kill_last_node(self) -> None:
        """Its raylet, on which all that runs there depends."""
        for process in psutil.Process(self._nodes[-1].pid).children(recursive=True):
            if process.name() == "raylet":
                process.kill()

    def stop(self) -> None:
        """Kill what was started."""
        for node in self._nodes:
            for process in psutil.Process(node.pid).children(recursive=True):
                process.kill()
            node.kill()
            node.communicate()

    def _start(self, *options: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
        node = subprocess.Popen(
            [*command, *options],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._nodes.append(node)
        assert node.stdout is not None
        lines = []
        for line in node.stdout:
            lines.append(line)
            if "Ray runtime started" in line:
                return
        raise AssertionError("".join(lines))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="gs", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        yield cluster
        cluster.stop()


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, (1, 2)], ids=["fixed", "elastic"])
def test_a_lost_node_and_a_new_one(
    make_config: MakeConfig, start: Start, cluster: Cluster, num_workers: int | tuple[int, int]
) -> None:
    """A run of fixed size waits for the new node; an elastic one shrinks, and grows with it."""
    elastic = num_workers != 2
    config = make_config(
        launch__backend="ray",
        launch__ray_address=cluster.address,
        **{**SETTINGS, "launch__num_workers": num_workers, "training__total_kimg": 64},
    )
    run_dir = RunDirectory(config.run_dir)
    seconds: dict[str, float] = {}

    def events(name: str) -> list[dict[str, Any]]:
        return [row for row in _events(config) if row["event"] == name]

    def until(what: str, happened: Callable[[], object]) -> None:
        began = time.monotonic()
        _wait(happened, driver)
        seconds[what] = round(time.monotonic() - began, 1)

    cluster.add_node()
    driver = start(config)
    wait_for_rows(run_dir.metrics, 20, driver)
    cluster.kill_last_node()
    if elastic:
        until("one worker", lambda: len(events("resume")) == 1)
        _trains_again(config, 1, driver)
    else:
        until("waiting", lambda: events("waiting"))
        assert not events("resume")
    cluster.add_node()
    num_resumes = len(events("resume"))
    until("two workers", lambda: len(events("resume")) > num_resumes)
    _trains_again(config, _attempts(config) - 1, driver)
    print(json.dumps(seconds))
    assert [e["world_size"] for e in events("resume")] == ([1, 2] if elastic else [2])
    if elastic:
        (regroup,), (stop,) = events("regroup"), events("stop")
        assert regroup["num_workers"] == 1
        assert events("resume")[-1]["nimg"] == stop["nimg"]  # nothing was trained twice
    driver.terminate()
    driver.communicate(timeout=600)
    assert driver.returncode == 143
