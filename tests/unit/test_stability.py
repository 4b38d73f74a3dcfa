"""Seeds of a recipe summed up: what counts as collapsed, shares and spreads by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ganscale.config import Config
from ganscale.errors import CheckpointError, ConfigError
from ganscale.evaluation.gan_metrics.stability import RunSummary, summarise, summarise_run
from ganscale.run_directory import RunDirectory

DIVERSITY = "metrics/diversity"


def write_run(
    root: Path, diversities: list[float | None], events: list[dict[str, Any]] | None = None
) -> Path:
    run_dir = RunDirectory(root)
    root.mkdir(parents=True)
    changes = {"seed": 7, "training.total_kimg": 0.256, "training.batch_size": 64}
    run_dir.config.write_text(Config().with_changes(changes).to_yaml())
    rows = [
        {"attempt": 1, "nimg": 64 * i, DIVERSITY: value, "time/images_per_second": 100.0 + i}
        for i, value in enumerate(diversities)
    ]
    end = {"event": "end", "attempt": 1, "nimg": 256}
    lines = [{"event": "start", "attempt": 1, "nimg": 0}, *(events or [end])]
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir.events.write_text("".join(json.dumps(event) + "\n" for event in lines))
    return root


def test_a_healthy_run_is_summed_up(tmp_path: Path) -> None:
    summary = summarise_run(write_run(tmp_path / "run", [40.0, 60.0, 50.0]), DIVERSITY)
    assert summary == RunSummary(
        name="run",
        seed=7,
        nimg=128,
        finished=True,
        collapses=(),
        rollbacks=0,
        value=50.0,
        images_per_second=101.0,
    )


@pytest.mark.parametrize(("last", "collapses"), [(24.9, ("lost diversity",)), (25.0, ())])
def test_less_than_a_quarter_of_the_best_diversity_is_a_collapse(
    tmp_path: Path, last: float, collapses: tuple[str, ...]
) -> None:
    summary = summarise_run(write_run(tmp_path / "run", [100.0, last]), DIVERSITY)
    assert summary.collapses == collapses


def test_diversity_that_came_back_is_no_collapse(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", [100.0, 10.0, 60.0])
    assert summarise_run(root, DIVERSITY).collapses == ()


def test_each_kind_of_alarm_is_named_once(tmp_path: Path) -> None:
    alarms = [
        {"event": "alarm", "kind": kind, "attempt": 1, "nimg": nimg}
        for nimg, kind in ((64, "stuck"), (128, "non_finite"), (192, "stuck"))
    ]
    summary = summarise_run(write_run(tmp_path / "run", [50.0], alarms), DIVERSITY)
    assert summary.collapses == ("stuck", "non_finite")
    assert not summary.finished


def test_an_alarm_that_a_rollback_undid_is_no_collapse(tmp_path: Path) -> None:
    events = [
        {"event": "alarm", "kind": "stuck", "attempt": 1, "nimg": 128},
        {"event": "rollback", "attempt": 2, "nimg": 64, "num_rollbacks": 1},
    ]
    summary = summarise_run(write_run(tmp_path / "run", [50.0], events), DIVERSITY)
    assert summary.collapses == ()
    assert summary.rollbacks == 1


def test_a_run_that_went_on_beyond_its_first_end_is_unfinished(tmp_path: Path) -> None:
    events = [{"event": "end", "attempt": 1, "nimg": 128}]
    assert not summarise_run(write_run(tmp_path / "run", [50.0], events), DIVERSITY).finished


def test_a_value_that_is_missing_or_not_finite_is_passed_over(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", [40.0, None])
    assert summarise_run(root, DIVERSITY).value == 40.0
    assert summarise_run(root, "metrics/fid").value is None


def summary(value: float | None, *collapses: str) -> RunSummary:
    return RunSummary("run", 0, 1000, True, collapses, 0, value, None)


def test_share_and_spread_are_those_of_hand() -> None:
    runs = [summary(1.0), summary(2.0, "stuck"), summary(3.0), summary(6.0), summary(None)]
    report = summarise(runs, "metrics/fid")
    assert report.collapsed.value == 0.2
    # Wilson's interval for 1 of 5, by formula: centre 0.33035, half width 0.29411.
    assert report.collapsed.low == pytest.approx(0.03622, abs=1e-5)
    assert report.collapsed.high == pytest.approx(0.62446, abs=1e-5)
    assert report.spread is not None
    assert (report.spread.low, report.spread.median, report.spread.high) == (1.0, 2.5, 6.0)
    assert (report.spread.lower_quartile, report.spread.upper_quartile) == (1.75, 3.75)
    # Mean 3, standard deviation 2.1602, t of 3 degrees of freedom 3.18245: half width 3.4374.
    assert report.spread.mean.value == 3.0
    assert report.spread.mean.low == pytest.approx(-0.4374, abs=1e-4)
    assert json.loads(json.dumps(report.to_json()))["spread"]["median"] == 2.5
    lines = "\n".join(report.lines())
    assert "collapsed 1 of 5" in lines
    assert "collapsed: stuck" in lines


def test_without_any_value_there_is_no_spread() -> None:
    report = summarise([summary(None)], "metrics/fid")
    assert report.spread is None
    assert "no run has a value of metrics/fid" in report.lines()[-1]


def test_no_runs_make_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        summarise([], DIVERSITY)
    with pytest.raises(CheckpointError, match="is not a run"):
        summarise_run(tmp_path, DIVERSITY)
