"""W&B in trouble never is training's: nothing waits, and nothing is lost, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from ganscale.run_directory import RunDirectory
from ganscale.tracking import wandb_sink
from ganscale.tracking.sinks import FAULTS, EventLog, JsonlSink
from ganscale.tracking.wandb_sink import WandbSink
from tests.conftest import MakeConfig
from tests.support.runs import final_digest, read_rows, start_ranks, wait_all, wait_for_rows
from tests.support.wandb_server import WandbServer, wandb_server


@dataclass
class Run:
    """What rank 0 writes of a run, and what it was told of W&B."""

    run_dir: RunDirectory
    mode: str = "offline"
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.metrics = JsonlSink(self.run_dir.metrics)
        self.events = EventLog(self.run_dir.events)
        self.sink = WandbSink(
            self.run_dir, project="tests", mode=self.mode, config={}, report=self.told.append
        )
        self.process = psutil.Process(self.sink._process.pid)

    def log(self, steps: Sequence[int]) -> None:
        for step in steps:
            row = {"step": step, "nimg": 16 * step, "train/loss_D": 1.0, "time/unix": time.time()}
            self.metrics.log(row)
            self.sink.log(row)

    def close(self) -> None:
        self.sink.close()
        self.metrics.close()
        self.events.close()

    @property
    def files(self) -> list[Path]:
        """The offline runs, in the order in which they were begun."""
        return sorted(self.run_dir.root.glob("wandb/offline-run-*/*.wandb"))

    def steps_in_files(self) -> list[int]:
        return [row["step"] for file in self.files for row in _history(file) if "step" in row]


Begin = Callable[..., Run]


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short timeouts, for servers that let them pass."""
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """Begins a run, on a server if one is given; no process may be left of it at the end."""
    monkeypatch.setattr(wandb_sink, "_RESTART_SECONDS", 0.0)
    others = set(psutil.Process().children(recursive=True))  # of tests before, in one process

    def start(name: str, server: WandbServer | None = None) -> Run:
        for variable, value in server.settings().items() if server else ():
            monkeypatch.setenv(variable, value)
        return Run(RunDirectory(tmp_path / name), "online" if server else "offline")

    yield start
    _wait(lambda: set(psutil.Process().children(recursive=True)) <= others, "all processes ended")


def _wait(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, f"expected: {what}"
        time.sleep(0.05)


def _records(file: Path) -> list[dict[str, Any]]:
    """The records of an offline file, read by wandb's own tool, which bears a cut-off end."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def _history(file: Path) -> list[dict[str, Any]]:
    return [r["history"]["item"] for r in _records(file) if r["type"] == "history"]


def test_a_server_in_trouble_costs_nothing_and_gets_all_rows_later(
    begin: Begin, impatience: None
) -> None:
    """Three servers at the same time: one hangs from the beginning, the others fail later."""
    with ExitStack() as stack:
        servers = [stack.enter_context(wandb_server()) for _ in range(3)]
        hanging, *others = servers
        hanging.fault = "hang"
        runs = [begin(name, server) for name, server in zip("abc", servers, strict=True)]
        for run in runs:
            run.log(range(10))
        _wait(lambda: all(len(server.rows) == 10 for server in others), "ten rows on each server")
        others[0].fault, others[1].fault = "refuse", "500"
        for run in runs:
            run.log(range(10, 20))
            run.close()
            assert run.steps_in_files() == list(range(20))
            (message,) = run.told
            assert "W&B did not take all of the run" in message
            assert "wandb sync" in message
        # The command of the message, where the server had nothing and where it had a part.
        for server, run in zip(servers[:2], runs[:2], strict=True):
            server.fault = None
            subprocess.run(
                [sys.executable, "-m", "wandb", "sync", str(run.files[0].parent)],
                cwd=run.run_dir.root,
                env={**os.environ, **server.settings()},
                check=True,
                timeout=600,
            )
            assert [row["step"] for row in server.rows] == list(range(20))


@pytest.mark.slow
def test_rows_reach_a_server_that_comes_back_while_the_run_goes_on(begin: Begin) -> None:
    with wandb_server() as server:
        server.fault = "500"
        run = begin("back", server)
        run.log(range(4))
        _wait(lambda: server.num_refused > 1, "requests that the server could not answer")
        server.fault = None
        _wait(lambda: server.rows, "rows")
        run.close()
        assert run.told == []
        assert {row["step"] for row in server.rows} == {0, 1, 2, 3}


def test_a_sound_server_gets_rows_group_and_faults(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep-1")
    with wandb_server() as server:
        run = begin("sound", server)
        run.events.write("resume", nimg=0)
        run.log(range(3))
        _wait(lambda: len(server.rows) == 4, "rows while the run goes on")
        run.events.write("alarm", message="no", nimg=80)
        _wait(lambda: len(server.rows) == 5, "the fault")
        run.log([6, 7])
        run.close()
        assert run.told == []
    (begun, *_) = [asked for name, asked in server.asked if name == "UpsertBucket"]
    assert (begun["project"], begun["displayName"]) == ("tests", "sound")
    assert (begun["groupName"], begun["jobType"]) == ("sweep-1", "train")
    alarms = [(row["nimg"], row["faults/alarm"]) for row in server.rows if "faults/alarm" in row]
    assert alarms == [(0, 0), (16, 0), (32, 0), (80, 1), (96, 1), (112, 1)]
    full = [row for row in server.rows if "step" in row]
    assert all({f"faults/{fault}" for fault in FAULTS} < set(row) for row in full)
    assert all(row["faults/resume"] == 1 for row in full)


@pytest.mark.slow  # the kill of training ends this process too
@pytest.mark.parametrize("victim", ["ganscale's process", "wandb-core"])
def test_after_a_kill_another_process_goes_on_and_no_row_is_lost(begin: Begin, victim: str) -> None:
    with wandb_server() as server:
        run = begin("killed", server)
        run.log(range(5))
        _wait(lambda: len(server.rows) == 5, "rows on the server")
        core = next(p for p in run.process.children() if p.name() == "wandb-core")
        killed = run.sink._process  # the sink may replace it at any of the rows that follow
        (run.process if victim == "ganscale's process" else core).kill()
        run.log(range(5, 10))  # of which nobody knows
        _wait(lambda: killed.poll() is not None, "its end")
        run.log(range(10, 12))
        run.close()
        (message,) = run.told
        assert "another one goes on where it stopped" in message
        assert str(run.run_dir.root / "wandb" / "process.log") in message
        assert len(run.files) == 2
        # The last rows before the kill may have been logged twice.
        for steps in (run.steps_in_files(), [row["step"] for row in server.rows]):
            assert sorted(set(steps)) == list(range(12))
        ids = {r["run"]["run_id"] for f in run.files for r in _records(f) if r["type"] == "run"}
        assert ids == {run.run_dir.wandb_run_id.read_text()}


@pytest.mark.slow
def test_a_wandb_that_stands_still_is_left_and_the_next_attempt_logs_what_it_lacks(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    monkeypatch.setattr(wandb_sink, "_MARGIN_SECONDS", 1.0)
    run = begin("stopped")
    run.log(range(3))
    _wait(lambda: run.files and run.steps_in_files() == [0, 1, 2], "rows in the file")
    (core,) = [p for p in run.process.children() if p.name() == "wandb-core"]
    core.suspend()
    run.log(range(3, 1000))  # more than the socket to wandb-core takes
    run.close()
    core.resume()
    assert "ended too early" in run.told[-1]
    monkeypatch.setattr(wandb_sink, "_MARGIN_SECONDS", 30.0)
    resumed = begin("stopped")
    resumed.close()
    assert resumed.told == []
    assert sorted(set(resumed.steps_in_files())) == list(range(1000))


def test_a_process_that_can_never_begin_is_reported_with_its_log(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RESUME", "sometimes")
    run = begin("never")
    monkeypatch.setattr(wandb_sink, "_RESTART_SECONDS", 1000.0)
    for step in (1, 2):  # the first replacement is at once, the second is not
        _wait(lambda: run.sink._process.poll() is not None, "its end")
        run.log([step])
        assert len(run.told) == 1
    run.close()
    assert len(run.told) > 1
    log = run.run_dir.root / "wandb" / "process.log"
    assert all(f"its log is {log}" in message for message in run.told)
    assert "resume" in log.read_text()


def service_of_another_wandb() -> str:
    """Where wandb says that its service is, in a process that has used it."""
    code = "import os, wandb; wandb.setup(); print(os.environ['WANDB_SERVICE'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def test_pictures_are_in_an_offline_run_over_nimg(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as callers:
        # As where the caller of ganscale.train has used wandb before.
        callers.setenv("WANDB_SERVICE", service_of_another_wandb())
        run = begin("run")
    picture = tmp_path / "samples.png"
    Image.new("RGB", (4, 4)).save(picture)
    run.log([2])
    run.sink.log_picture("samples", picture, nimg=32, step=2)
    run.close()
    assert run.told == []
    (file,) = run.files
    (samples,) = [row for row in _history(file) if row.get("samples._type") == "image-file"]
    assert (samples["nimg"], samples["samples.caption"]) == (32, "0.032 kimg")
    assert (file.parent / "files" / samples["samples.path"]).read_bytes() == picture.read_bytes()
    metrics = [r for r in _records(file) if r["type"] == "metric"]
    axes = {r["metric"].get("glob_name"): r["metric"].get("step_metric") for r in metrics}
    assert axes["*"] == "nimg"


def test_training_with_a_server_that_hangs_is_training_without_one(
    make_config: MakeConfig, impatience: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = make_config(name="alone")
    wait_all(start_ranks(alone, 1))
    config = make_config(name="hangs", tracking__wandb="online")
    with wandb_server() as server:
        server.fault = "hang"
        for variable, value in server.settings().items():
            monkeypatch.setenv(variable, value)
        wait_all(start_ranks(config, 1), timeout=600)
    run_dir = RunDirectory(config.run_dir)
    assert final_digest(config) == final_digest(alone)
    assert [row["step"] for row in read_rows(run_dir.metrics)] == list(range(1, 11))
    told = [row["message"] for row in read_rows(run_dir.events) if row["event"] == "wandb"]
    assert told[-1].startswith("W&B did not take all of the run in time")


def test_a_kill_of_training_loses_no_row_and_resume_keeps_the_run_id(
    make_config: MakeConfig,
) -> None:
    config = make_config(
        tracking__wandb="offline",
        tracking__log_every_kimg=0.064,
        checkpoint__every_kimg=0.128,
        training__total_kimg=1.28,
    )
    run_dir = RunDirectory(config.run_dir)
    (rank,) = start_ranks(config, 1)
    wait_for_rows(run_dir.metrics, 9, rank)
    os.kill(rank.pid, signal.SIGKILL)
    rank.communicate()
    wait_all(start_ranks(config, 1))
    files = sorted(run_dir.root.glob("wandb/offline-run-*/*.wandb"))
    rows = [row for file in files for row in _history(file) if "train/loss_D" in row]
    assert [r["step"] for r in rows] == [row["step"] for row in read_rows(run_dir.metrics)]
    ids = {r["run"]["run_id"] for f in files for r in _records(f) if r["type"] == "run"}
    assert ids == {run_dir.wandb_run_id.read_text()}
