"""Sweeps on Ray Tune, on one Ray for all tests: trials are runs, and no kill loses work."""

from __future__ import annotations

import os
import re
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from ganscale.checkpoint import Attempt, CheckpointStore
from ganscale.config import load_config
from ganscale.config.sweep import Sweep
from ganscale.launch.ray_cluster import cluster
from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig, Verb
from tests.support.processes import Command
from tests.support.runs import final_digest, read_rows, start_ranks, wait_all

WriteSweep = Callable[..., Path]

ASHA = {"name": "asha", "grace_kimg": 0.16, "reduction": 2}
PBT = {"name": "pbt", "interval_kimg": 0.16, "quantile": 0.5}


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A Ray that this process and its children use; sweeps of this process share its workers."""
    before = dict(os.environ)
    # Short, as Ray makes sockets in it; and it may still be writing there.
    with tempfile.TemporaryDirectory(prefix="gs", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        with cluster(None):
            yield ray.get_runtime_context().gcs_address
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def write_sweep(tmp_path: Path, make_config: MakeConfig) -> WriteSweep:
    """A sweep file of tiny trials, with values of the metric at 0.16, 0.32 ... and at the end."""

    def write(
        scheduler: dict[str, Any], trials: int, at_once: int | None = None, **overrides: Any
    ) -> Path:
        settings = {
            "training__total_kimg": 0.48,
            "samples__every_kimg": 0.16,
            "checkpoint__every_kimg": 0.08,
            "launch__backend": "ray",
            **overrides,
        }
        (tmp_path / "base.yaml").write_text(make_config(**settings).to_yaml())
        file = tmp_path / "sweep.yaml"
        values = {
            "name": "tiny",
            "config": "base.yaml",
            "search": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}},
            "mode": "max",
            "scheduler": scheduler,
            "trials": trials,
            "max_concurrent": at_once,
        }
        file.write_text(yaml.safe_dump(values))
        return file

    return write


def events(sweep: Sweep, trial: str, kind: str) -> list[dict[str, Any]]:
    rows = read_rows(RunDirectory(sweep.root / trial).events)
    return [row for row in rows if row["event"] == kind]


def reached(sweep: Sweep) -> dict[str, int]:
    """The position of each trial's newest checkpoint, of those that have one."""
    lines = {t.name: CheckpointStore(sweep.root / t.name / "checkpoints") for t in sweep.trials()}
    newest = {name: store.lineage()[:1] for name, store in lines.items()}
    return {name: line[0].nimg for name, line in newest.items() if line}


def newest_attempt(sweep: Sweep, trial: str) -> Attempt:
    attempt = CheckpointStore(sweep.root / trial / "checkpoints").newest_attempt()
    assert attempt is not None
    return attempt


def wait(what: Callable[[], object], driver: Command) -> None:
    deadline = time.monotonic() + 600
    while not what():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def decided_by_medians(sweep: Sweep) -> dict[str, list[str]]:
    """State and position of each trial if it is stopped at 0.16 or 0.32 kimg when it is below the
    median of those that have come there before it."""
    seen: dict[int, list[float]] = {160: [], 320: []}
    ends = {}
    for trial in sweep.trials():
        rows = read_rows(RunDirectory(sweep.root / trial.name).metrics)
        ends[trial.name] = ["finished", "0.48"]
        for nimg, before in seen.items():
            score = next(row["metrics/diversity"] for row in rows if row["nimg"] == nimg)
            goes_on = not before or score >= statistics.median(before)
            before.append(score)
            if not goes_on:
                ends[trial.name] = ["stopped", f"{nimg / 1000:g}"]
                break
    return ends


def table(output: str) -> dict[str, list[str]]:
    """Its rows by trial, in their order."""
    lines = [line.split() for line in output.splitlines() if re.match(r"tiny-\d+ ", line)]
    return {line[0]: line[1:] for line in lines}


@pytest.mark.timeout(600)  # far less on a quiet machine
def test_halving_stops_by_medians_and_a_trial_is_a_run_of_its_own(
    ray_address: str, write_sweep: WriteSweep, verb: Verb
) -> None:
    """One trial at a time, so that halving compares each with those before it."""
    file = write_sweep(ASHA, 2, at_once=1)
    sweep = Sweep.load(file)
    _check_results(sweep, file, verb)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_halving_goes_on_from_the_checkpoints_after_a_stop_and_a_kill(
    ray_address: str, write_sweep: WriteSweep, verb: Verb
) -> None:
    file = write_sweep(ASHA, 3, at_once=1)
    sweep = Sweep.load(file)
    driver = Command("sweep", str(file), variables={"RAY_ADDRESS": ray_address})
    wait(lambda: reached(sweep), driver)
    driver.terminate()
    assert driver.wait(120) == 143, driver.communicate()
    stopped = {name: events(sweep, name, "stop") for name in reached(sweep)}
    assert all(lines[-1]["nimg"] == reached(sweep)[name] for name, lines in stopped.items())

    driver = Command("sweep", str(file), variables={"RAY_ADDRESS": ray_address})
    begun = reached(sweep)
    wait(lambda: reached(sweep) != begun, driver)
    (name,) = [name for name, nimg in reached(sweep).items() if nimg != begun.get(name)][:1]
    killed = newest_attempt(sweep, name)
    assert killed.holder is not None
    os.kill(killed.holder.pid, signal.SIGKILL)
    # Tune starts it again.
    wait(lambda: newest_attempt(sweep, name).number > killed.number, driver)
    driver.kill()
    driver.communicate()
    before, resumed = reached(sweep), {t: len(events(sweep, t, "resume")) for t in reached(sweep)}

    _check_results(sweep, file, verb)
    for name, nimg in before.items():
        for resume in events(sweep, name, "resume")[resumed[name] :][:1]:
            assert resume["nimg"] >= nimg  # what was durable at the kill is not trained again


def _check_results(sweep: Sweep, file: Path, verb: Verb) -> None:
    """Bring the sweep to its end: the table, the command of its best, the first trial's weights."""
    code, output, errors = verb("sweep", file)
    assert code == 0, errors
    rows = table(output)
    assert rows.keys() == {trial.name for trial in sweep.trials()}
    assert {name: row[:2] for name, row in rows.items()} == decided_by_medians(sweep)
    scores = [float(row[2]) for row in rows.values()]
    assert scores == sorted(scores, reverse=True)
    best = next(iter(rows))
    command = f"best: ganscale train --config {file.parent}/base.yaml name={best}-again"
    assert output.splitlines()[-1].startswith(command)

    trial = sweep.trials()[0]  # nothing was there to stop it
    assert rows[trial.name][0] == "finished"
    config = sweep.config(trial.name, trial.values)
    places = {"name": "alone", "storage": str(file.parent), "launch.backend": "inprocess"}
    alone = config.with_changes(places)
    wait_all(start_ranks(alone, 1))
    assert final_digest(config) == final_digest(alone)

    assert table(verb("sweep", file)[1]) == rows  # all are over: there is nothing to do


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_member_of_a_population_takes_over_another_s_weights_and_a_third_fails(
    ray_address: str, write_sweep: WriteSweep, verb: Verb
) -> None:
    file = write_sweep(PBT, 3, training__total_kimg=0.32, launch__max_failures=0)
    sweep = Sweep.load(file)
    (sweep.root / "tiny-001" / "metrics.jsonl").mkdir(parents=True)  # where a file should be
    code, output, errors = verb("sweep", file)
    assert code == 1, errors
    rows = table(output)
    assert {name: row[0] for name, row in rows.items()} == {
        "tiny-000": "finished",
        "tiny-001": "failed",
        "tiny-002": "finished",
    }
    (message,) = [line for line in output.splitlines() if line.startswith("tiny-001: ")]
    assert "IsADirectoryError" in message

    (target,) = [name for name in ("tiny-000", "tiny-002") if events(sweep, name, "copy")]
    (copy,) = events(sweep, target, "copy")
    assert {copy["source"], target} == {"tiny-000", "tiny-002"}
    assert rows[target][-1] == copy["source"]
    run_dir = RunDirectory(sweep.root / target)
    store = CheckpointStore(run_dir.root / "checkpoints")
    (name,) = [name for name in store.names() if name.attempt == copy["attempt"]]
    source = CheckpointStore(Path(copy["checkpoint"]).parent)
    (original,) = [name for name in source.names() if source.where(name) == copy["checkpoint"]]
    copied, digest = store.read(name), source.read(original).meta["tensors_sha256"]
    assert (copied.name.nimg, copied.meta["tensors_sha256"]) == (original.nimg, digest)
    resumed = events(sweep, target, "resume")[-1]
    assert (resumed["nimg"], resumed["attempt"]) == (copy["nimg"], copy["attempt"] + 1)
    rate = load_config(run_dir.config).optimizer.lr.start
    assert rate == copy["values"]["optimizer.lr"]
    assert 1e-4 <= rate <= 1e-2
    assert rate not in [trial.values["optimizer.lr"] for trial in sweep.trials()]
    # The other verbs take a trial as the run that it is.
    assert verb("checkpoint", "list", run_dir.root)[0] == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trials_that_are_groups_of_workers_are_stopped_and_go_on(
    ray_address: str, write_sweep: WriteSweep, verb: Verb
) -> None:
    file = write_sweep(PBT, 2, training__total_kimg=0.32, launch__num_workers=2)
    sweep = Sweep.load(file)
    driver = Command("sweep", str(file), variables={"RAY_ADDRESS": ray_address})
    wait(lambda: reached(sweep), driver)
    driver.terminate()
    assert driver.wait(120) == 143, driver.communicate()
    code, output, errors = verb("sweep", file)
    assert code == 0, errors
    assert {row[0] for row in table(output).values()} == {"finished"}
    assert sum(len(events(sweep, trial.name, "copy")) for trial in sweep.trials()) == 1
