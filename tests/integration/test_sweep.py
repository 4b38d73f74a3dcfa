"""Sweeps on Ray Tune: killed and started again, they end as if nothing had happened."""

from __future__ import annotations

import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ganscale.checkpoint import CheckpointStore
from ganscale.config.sweep import Sweep
from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig
from tests.support.runs import final_digest, own_ray, read_rows, start_ranks, wait_all

Start = Callable[[Path], subprocess.Popen[str]]
WriteSweep = Callable[..., Path]

ASHA = {"name": "asha", "grace_kimg": 0.16, "reduction": 2}
PBT = {"name": "pbt", "interval_kimg": 0.16, "quantile": 0.5}


@pytest.fixture
def start() -> Iterator[Start]:
    """`ganscale sweep` with a Ray of its own."""
    with own_ray() as start_driver:
        yield lambda file: start_driver("sweep", str(file), stdout=subprocess.PIPE)


@pytest.fixture
def write_sweep(tmp_path: Path, make_config: MakeConfig) -> WriteSweep:
    """A sweep file of tiny trials of 0.48 kimg, with values at 0.16, 0.32 and at the end."""

    def write(scheduler: dict[str, Any], trials: int = 4, **overrides: Any) -> Path:
        settings = {
            "training__total_kimg": 0.48,
            "samples__every_kimg": 0.16,
            "checkpoint__every_kimg": 0.08,
            "launch__backend": "ray",
            **overrides,
        }
        base = tmp_path / "base.yaml"
        base.write_text(make_config(**settings).to_yaml())
        file = tmp_path / "sweep.yaml"
        values = {
            "name": "tiny-sweep",
            "config": "base.yaml",
            "search": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}},
            "mode": "max",
            "scheduler": scheduler,
            "trials": trials,
        }
        file.write_text(yaml.safe_dump(values))
        return file

    return write


def events(sweep: Sweep, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(sweep.root / "sweep.jsonl") if row["event"] == name]


def wait(what: Callable[[], object], driver: subprocess.Popen[str], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def finish(driver: subprocess.Popen[str], code: int = 0) -> list[str]:
    """The lines that it printed."""
    output, errors = driver.communicate(timeout=600)
    assert driver.returncode == code, errors
    return output.splitlines()


def table(lines: list[str]) -> dict[str, list[str]]:
    """Its rows by trial, in their order."""
    return {line.split()[0]: line.split()[1:] for line in lines if line.startswith("tiny-sweep-")}


@pytest.mark.timeout(900)  # far less on a quiet machine
def test_halving_that_is_killed_goes_on(start: Start, write_sweep: WriteSweep) -> None:
    """Decided by the medians, as if it had not been; trials are what `ganscale train` trains."""
    file = write_sweep(ASHA)
    sweep = Sweep.load(file)
    driver = start(file)
    wait(lambda: len(events(sweep, "result")) >= 2, driver)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before = events(sweep, "result")

    lines = finish(start(file))
    after = events(sweep, "result")
    assert after[: len(before)] == before
    places = [(row["trial"], row["kimg"]) for row in after]
    assert len(places) == len(set(places))  # nothing was told twice
    rows = table(lines)
    assert sorted(rows) == [trial.name for trial in sweep.trials()]
    seen: list[float] = []
    for row in (row for row in after if row["kimg"] == 0.16):
        goes_on = not seen or row["score"] >= statistics.median(seen)
        assert row["state"] == ("running" if goes_on else "stopped")
        seen.append(row["score"])
    scores = [float(row[2]) for row in rows.values()]
    assert scores == sorted(scores, reverse=True)
    best = next(iter(rows))
    assert lines[-1].startswith(
        f"best: ganscale train --config {file.parent}/base.yaml name={best}-again"
    )

    finished = [trial for trial in sweep.trials() if rows[trial.name][0] == "finished"]
    trial = max(finished, key=lambda t: len(_attempts(sweep, t.name)))
    config = sweep.config(trial.name, trial.values)
    alone = config.with_changes(
        {"name": "alone", "storage": str(file.parent), "launch.backend": "inprocess"}
    )
    wait_all(start_ranks(alone, 1))
    assert final_digest(config) == final_digest(alone)

    assert table(finish(start(file))) == rows  # all are over: there is nothing to do
    assert events(sweep, "result") == after


def _attempts(sweep: Sweep, name: str) -> list[Any]:
    return CheckpointStore(sweep.root / name / "checkpoints").attempts()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("num_workers", "num_trials"), [(1, 4), (2, 2)])
def test_a_population_is_stopped_and_killed_and_goes_on(
    start: Start, write_sweep: WriteSweep, num_workers: int, num_trials: int
) -> None:
    """With trials of one worker, and with trials that are groups of two, one after the other."""
    file = write_sweep(PBT, num_trials, launch__num_workers=num_workers)
    sweep = Sweep.load(file)
    driver = start(file)
    wait(lambda: events(sweep, "round"), driver)
    driver.terminate()
    lines = finish(driver, 143)
    assert lines[-1] == f"stopped; to go on: ganscale sweep {file}"
    driver = start(file)
    wait(lambda: len(events(sweep, "round")) == 2, driver)
    driver.kill()
    driver.communicate()
    rows = table(finish(start(file)))
    assert {row[0] for row in rows.values()} == {"finished"}
    rounds, copies = events(sweep, "round"), events(sweep, "copy")
    assert [row["kimg"] for row in rounds] == [0.16, 0.32]
    assert len(copies) == num_trials  # half of them in each of two rounds
    for copy in copies:
        config = sweep.config(copy["trial"], copy["values"])
        told = [e for e in read_rows(RunDirectory(config.run_dir).events) if e["event"] == "copy"]
        assert copy["checkpoint"] in [event["checkpoint"] for event in told]
        assert copy["source"] in [event["source"] for event in told]
    for trial in sweep.trials():
        run_dir = RunDirectory(sweep.root / trial.name)
        assert read_rows(run_dir.events)[-1]["event"] == "end"
