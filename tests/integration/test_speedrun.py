"""benchmarks/speedrun.py on the CPU at its smallest: schedules, marks, a pause, and the tables."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import speedrun
from ganscale.config import load_config
from ganscale.generation.snapshot import load_generator
from ganscale.training.benchmark import TrainingSpeed
from tests.support.small_extractor import SmallExtractor

SPEED = TrainingSpeed("fp32", 16, 160.0, {}, None, None, 3)
"""Images of ten steps of a tenth of a second."""

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, procedural_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the script in a folder; returns all lines that are in its file then."""
    monkeypatch.setenv("GANSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speedrun, "open_extractor", lambda name: SmallExtractor())

    def count(clock: speedrun.Clock, state: Any) -> None:
        clock.seconds = 0.1 * state.step  # a step takes as long as it does on any machine

    monkeypatch.setattr(speedrun.Clock, "_count", count)
    folder = tmp_path / "speedrun"

    def call(*arguments: object) -> list[dict[str, Any]]:
        always = (
            "--shards", procedural_shards, "--folder", folder, "--device", "cpu", "--num", 40,
            "--calibration-seconds", 0, "--seconds", 1,
            "--set", "model.base_channels=4", "training.batch_size=16",
        )  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["speedrun", *map(str, (*always, *arguments))])
        speedrun.main()
        lines = (folder / "lines.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return call


@pytest.fixture
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, which takes thirty steps."""
    monkeypatch.setattr(speedrun, "bench_training", lambda config, world, seconds: SPEED)


def of(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("name", speedrun.CONFIGURATIONS)
def test_each_configuration_is_valid_and_ends_where_its_time_does(name: str) -> None:
    config = load_config(speedrun.PRESET, speedrun.CONFIGURATIONS[name])
    short = speedrun.stretched(config, 123.0)
    assert short.training.total_kimg == 123
    # The learning rate is at its end there, and half way at the mean of both ends.
    rates, asked = short.optimizer.lr, config.optimizer.lr
    assert rates.at(123_000) == pytest.approx(asked.end)
    assert rates.at(61_500) == pytest.approx((asked.start + asked.end) / 2)
    assert short.training.ema_halflife_kimg.kimg == pytest.approx(12.3)
    assert short.training.ema_halflife_kimg.end == config.training.ema_halflife_kimg.end
    assert (short.model, short.data) == (config.model, config.data)


def test_there_is_a_choice() -> None:
    assert len(speedrun.CONFIGURATIONS) >= 12


@pytest.mark.slow
@pytest.mark.usefixtures("known_speed")
def test_configurations_are_trained_measured_and_compared(run: Run, tmp_path: Path) -> None:
    names = ("hinge", "hinge-shared-fakes")
    lines = run("--names", *names, "--marks", 0.5, 1, "--averages")
    assert [line["name"] for line in of(lines, "trained")] == list(names)
    folder = tmp_path / "speedrun"
    for name in names:
        marks = [line for line in of(lines, "mark") if line["name"] == name]
        assert [line["mark"] for line in marks] == [0.5, 1.0]
        assert [line["seconds"] for line in marks] == [0.5, 1.0]
        assert [line["nimg"] for line in marks] == [80, 160]
        assert set(marks[1]["snapshots"]) == {"main", "ema-25", "ema-400"}
        assert load_generator(marks[1]["snapshots"]["main"]).info["nimg"] == marks[1]["nimg"]
        points = [(p["mark"], p["average"]) for p in of(lines, "fid") if p["name"] == name]
        assert points == [(0.5, "main"), *((1.0, a) for a in ("main", "ema-25", "ema-400"))]
    rows = list(csv.DictReader((folder / "curve.csv").read_text().splitlines()))
    assert len(rows) == 8
    text = (folder / "SPEEDRUN.md").read_text()
    assert "| configuration | changed | images/s | kimg | 0.5 s | 1 s | 95 % interval |" in text
    last = {
        p["name"]: p["value"] for p in of(lines, "fid") if (p["mark"], p["average"]) == (1, "main")
    }
    order = sorted(names, key=lambda name: last[name])
    assert text.index(f"| {order[0]} |") < text.index(f"| {order[1]} |")
    # A second call finds all done.
    assert run("--names", *names, "--marks", 0.5, 1, "--averages") == lines


@pytest.mark.usefixtures("known_speed")
@pytest.mark.slow
def test_a_run_that_the_budget_ends_goes_on_with_the_time_it_has_left(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_run = speedrun.Clock.run

    def run_out(clock: speedrun.Clock, state: Any) -> None:
        clock_run(clock, state)
        if state.step == 3:
            clock.stop.reason = "terminated"

    monkeypatch.setattr(speedrun.Clock, "run", run_out)
    lines = run("--names", "hinge", "--keep-newest")
    (paused,) = of(lines, "paused")
    assert not of(lines, "trained")
    # The stop is agreed on a step later.
    assert paused["nimg"] == 4 * 16
    monkeypatch.setattr(speedrun.Clock, "run", clock_run)
    lines = run("--names", "hinge", "--keep-newest")
    (trained,) = of(lines, "trained")
    assert [line["nimg"] for line in of(lines, "mark")] == [80, 160]
    assert len(of(lines, "plan")) == 1
    # Ten steps, and the one in which the stop is agreed on.
    assert trained["nimg"] == 11 * 16
    with pytest.raises(SystemExit, match="another --folder"):
        run("--names", "hinge", "--keep-newest", "--set", "seed=1")


@pytest.mark.slow
def test_a_configuration_that_fails_does_not_cost_the_others(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(speedrun.CONFIGURATIONS, "hinge-r1", ["optimizer.beta1=2"])
    lines = run("--names", "hinge-r1", "hinge", "--marks", 1)
    (error,) = of(lines, "error")
    assert error["name"] == "hinge-r1"
    assert [line["name"] for line in of(lines, "trained")] == ["hinge"]
    assert "- hinge-r1: ConfigError" in (tmp_path / "speedrun" / "SPEEDRUN.md").read_text()
