"""W&B in trouble never is training's: nothing waits, nothing is lost that a kill need not lose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
from PIL import Image

from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import FAULTS
from ganscale.tracking.wandb_settings import ARTIFACTS_VARIABLE
from ganscale.tracking.wandb_sink import WandbSink
from tests.conftest import MakeConfig
from tests.support.runs import final_digest, read_rows, start_ranks, wait_all, wait_for_rows
from tests.support.wandb_server import WandbFault, WandbServer, wandb_server

INIT_SECONDS = FINISH_SECONDS = 4.0
CLOSING_SECONDS = INIT_SECONDS + 2 * FINISH_SECONDS + 30
NUM_ROWS = 20


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short, so that tests are."""
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", str(INIT_SECONDS))
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))


@dataclass
class Logged:
    """A sink, its server, and what it told."""

    sink: WandbSink
    server: WandbServer
    run_dir: RunDirectory
    told: list[str] = field(default_factory=list)
    slowest_log: float = 0.0
    is_closed: bool = False

    def log(self, steps: range) -> None:
        for step in steps:
            began = time.monotonic()
            self.sink.log({"step": step, "nimg": 16 * step, "train/loss_D": 1 / (step + 1)})
            self.slowest_log = max(self.slowest_log, time.monotonic() - began)

    def close(self) -> float:
        began = time.monotonic()
        self.sink.close()
        self.is_closed = True
        return time.monotonic() - began

    @property
    def steps_on_disk(self) -> list[int]:
        files = self.run_dir.root.glob("wandb/*run-*/*.wandb")
        # A start that failed leaves a file as well, which may be closed later.
        return max((_metric_steps(file) for file in files), key=len)


@pytest.fixture
def online(tmp_path: Path, patience: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Begins a run on a server of its own; its argument is what goes wrong from the start."""
    runs: list[Logged] = []
    others = set(psutil.Process().children(recursive=True))  # of tests before, in one process
    with ExitStack() as stack:

        def begin(name: str, fault: WandbFault | None = None) -> Logged:
            server = stack.enter_context(wandb_server())
            server.fault = fault
            for variable, value in server.settings().items():
                monkeypatch.setenv(variable, value)
            told: list[str] = []
            run_dir = RunDirectory(tmp_path / name)
            sink = WandbSink(run_dir, project="tests", mode="online", config={}, report=told.append)
            runs.append(Logged(sink, server, run_dir, told))
            return runs[-1]

        yield begin
        for run in runs:
            if not run.is_closed:
                run.close()
    assert set(psutil.Process().children(recursive=True)) <= others


def _until_begun(runs: list[Logged]) -> None:
    deadline = time.monotonic() + 60
    while not all(any(name == "UpsertBucket" for name, _ in run.server.asked) for run in runs):
        assert time.monotonic() < deadline, "no run was begun"
        time.sleep(0.05)


@pytest.mark.parametrize("moment", ["begin", pytest.param("middle", marks=pytest.mark.slow), "end"])
def test_a_server_in_trouble_is_told_of_and_delays_nothing(online: Any, moment: str) -> None:
    """Three servers that hang, refuse and fail, at the same time."""
    faults: tuple[WandbFault, ...] = get_args(WandbFault)
    runs = [online(fault, fault if moment == "begin" else None) for fault in faults]
    for run in runs:
        run.log(range(NUM_ROWS // 2))
    if moment != "begin":
        _until_begun(runs)
    for fault, run in zip(faults, runs, strict=True):
        if moment == "middle":
            run.server.fault = fault
        run.log(range(NUM_ROWS // 2, NUM_ROWS))
    for fault, run in zip(faults, runs, strict=True):
        run.server.fault = fault
        assert run.close() < CLOSING_SECONDS
        assert run.slowest_log < 1
        what = "logged offline" if moment == "begin" else "did not take all of the run"
        assert any(what in message and "wandb sync" in message for message in run.told), run.told
        assert run.steps_on_disk == list(range(NUM_ROWS))


def test_a_sound_server_gets_rows_group_alerts_and_faults(
    online: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep-1")
    run = online("sound")
    run.sink.begin([], [{"event": "resume", "attempt": 2, "nimg": 0}])
    run.log(range(3))
    run.sink.event({"event": "alarm", "time": 1.0, "attempt": 2, "message": "no", "step": 5})
    run.log(range(6, 8))
    run.close()
    (begun, *_) = [asked for name, asked in run.server.asked if name == "UpsertBucket"]
    assert (begun["project"], begun["displayName"]) == ("tests", "sound")
    assert (begun["groupName"], begun["jobType"]) == ("sweep-1", "train")
    (alert,) = [asked for name, asked in run.server.asked if name == "NotifyScriptableRunAlert"]
    assert (alert["title"], alert["text"]) == ("sound: alarm", "no")
    alarms = [(row["step"], row["faults/alarm"]) for row in run.server.rows]
    assert alarms == [(0, 0), (1, 0), (2, 0), (5, 1), (6, 1), (7, 1)]
    full = [row for row in run.server.rows if "train/loss_D" in row]
    assert {name for row in full for name in row if "faults/" in name} == {
        f"faults/{fault}" for fault in FAULTS
    }
    assert all(row["faults/resume"] == 1 for row in full)


@pytest.mark.parametrize("victim", ["ganscale's process", "wandb-core"])
def test_when_the_process_is_killed_an_offline_run_takes_what_comes_from_then_on(
    online: Any, victim: str
) -> None:
    run = online("killed")
    run.log(range(5))
    _until_begun([run])
    while not any("train/loss_D" in row for row in run.server.rows):
        time.sleep(0.05)  # so that wandb-core runs, and has what it was given
    process = psutil.Process(run.sink._helper._process.pid)
    (process if victim == "ganscale's process" else process.children()[0]).kill()
    step = 5
    while not run.told:
        if victim == "wandb-core":  # a row that is sent to it while it dies goes unnoticed
            run.log(range(step, step + 1))
            step += 1
        time.sleep(0.2)
    (message,) = run.told
    why = "killed by SIGKILL" if victim == "ganscale's process" else "wandb-core is gone"
    assert why in message
    log = run.run_dir.root / "wandb" / "messages.log"
    assert log.is_file()
    assert f"its log is {log}" in message
    assert "logged offline" in message
    assert "wandb sync" in message
    run.log(range(step, step + 3))
    run.close()
    assert len(run.told) == 1
    (file,) = run.run_dir.root.glob("wandb/offline-run-*/*.wandb")
    assert _metric_steps(file)[-3:] == [step, step + 1, step + 2]
    ids = {r["run"]["run_id"] for r in _records(file) if r["type"] == "run"}
    assert ids == {run.sink.run_id}


def test_a_process_that_can_never_begin_is_reported_once_with_the_reason(
    tmp_path: Path, patience: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RESUME", "sometimes")  # refused by wandb; not one that we check
    told: list[str] = []
    run_dir = RunDirectory(tmp_path / "run")
    sink = WandbSink(run_dir, project="tests", mode="offline", config={}, report=told.append)
    sink.log({"step": 1, "nimg": 16})
    sink.close()
    (message,) = told
    assert "could not begin an offline run" in message
    assert "resume" in message
    assert str(run_dir.root / "wandb" / "messages.log") in message


def test_pictures_tables_and_artifacts_are_in_an_offline_run(
    tmp_path: Path, patience: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ARTIFACTS_VARIABLE, "all")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    run_dir, told = RunDirectory(tmp_path / "run"), list[str]()
    sink = WandbSink(run_dir, project="tests", mode="offline", config={}, report=told.append)
    sink.begin([{"nimg": 0, "step": 0, "metrics/fid": 300.0}], [])
    picture, snapshot = tmp_path / "samples.png", tmp_path / "snapshot.safetensors"
    Image.new("RGB", (4, 4)).save(picture)
    snapshot.write_bytes(b"weights")
    sink.log({"step": 2, "nimg": 32, "metrics/fid": 200.0, "metrics/diversity": 0.5})
    sink.log_picture("samples", picture, nimg=32, step=2)
    sink.log_snapshot(snapshot, average="", nimg=32)
    sink.log_snapshot(snapshot, average="best", nimg=32)
    sink.close()
    assert told == []
    (file,) = run_dir.root.glob("wandb/offline-run-*/*.wandb")
    records = _records(file)
    logged = [r["history"]["item"] for r in records if r["type"] == "history"]
    (samples,) = [row for row in logged if row.get("samples._type") == "image-file"]
    assert (samples["step"], samples["samples.caption"]) == (2, "0.032 kimg")
    files = file.parent / "files"
    assert (files / samples["samples.path"]).read_bytes() == picture.read_bytes()
    (table,) = [row for row in logged if row.get("evaluations._type") == "table-file"]
    content = json.loads((files / table["evaluations.path"]).read_text())
    assert content["columns"] == ["nimg", "metrics/fid"]
    assert content["data"] == [[0, 300.0], [32, 200.0]]
    models = [r["artifact"] for r in records if r["type"] == "artifact"]
    models = [model for model in models if model["type"] == "model"]
    assert [(model["name"], set(model["aliases"])) for model in models] == [
        ("run", {"latest", "kimg-0.032"}),
        ("run", {"latest", "best", "kimg-0.032"}),  # W&B calls the last version the latest
    ]


def test_training_with_a_server_that_hangs_is_training_without_one(
    make_config: MakeConfig, patience: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = make_config(name="alone")
    wait_all(start_ranks(alone, 1))
    config = make_config(name="hangs", tracking__wandb="online")
    with wandb_server() as server:
        server.fault = "hang"
        for variable, value in server.settings().items():
            monkeypatch.setenv(variable, value)
        wait_all(start_ranks(config, 1), timeout=120)
    run_dir = RunDirectory(config.run_dir)
    assert final_digest(config) == final_digest(alone)
    assert [row["step"] for row in read_rows(run_dir.metrics)] == list(range(1, 11))
    (told,) = [row["message"] for row in read_rows(run_dir.events) if row["event"] == "wandb"]
    assert told.startswith("W&B could not be reached within 4 s")


def _records(file: Path) -> list[dict[str, Any]]:
    """The records of an offline file, read by wandb's own tool, which bears a cut-off end."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def _metric_steps(file: Path) -> list[int]:
    steps = []
    for record in _records(file):
        if record["type"] == "history":
            row = record["history"]["item"]
            if "train/loss_D" in row:
                steps.append(row["step"])
    return steps


def _until_written(run_dir: RunDirectory) -> Path:
    """The file of the run's helper process, which may still be starting."""
    deadline = time.monotonic() + 60
    while not (files := sorted(run_dir.root.glob("wandb/offline-run-*/*.wandb"))):
        assert time.monotonic() < deadline, "no file was begun"
        time.sleep(0.1)
    return files[0]


def _until_whole(file: Path) -> None:
    """Wait for the helper process of a run that was killed, which writes what it was given."""
    deadline = time.monotonic() + 60
    while not any(record["type"] == "exit" for record in _records(file)):
        assert time.monotonic() < deadline, "the file has no end"


def test_kill_loses_at_most_one_row_and_resume_keeps_the_run_id(make_config: MakeConfig) -> None:
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
    logged = [row["step"] for row in read_rows(run_dir.metrics)]
    assert logged == list(range(4, 4 * len(logged) + 1, 4))
    first = _until_written(run_dir)
    _until_whole(first)
    kept = _metric_steps(first)
    assert len(kept) >= len(logged) - 1
    assert kept == logged[: len(kept)]

    wait_all(start_ranks(config, 1))
    files = sorted(run_dir.root.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    ids = {r["run"]["run_id"] for f in files for r in _records(f) if r["type"] == "run"}
    assert ids == {(run_dir.root / "wandb_run_id").read_text()}
    assert _metric_steps(files[1])[-1] == 80
