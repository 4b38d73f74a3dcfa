"""`ganscale tournament` and `ganscale stability`: what they print, and how they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ganscale.cli import main
from ganscale.evaluation.reconstruction.comparison import load_run
from ganscale.generation.inversion import InversionSettings
from ganscale.generation.snapshot import save_snapshot
from ganscale.models import build_generator
from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig
from tests.support.runs import read_rows


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    code = run(*arguments)
    streams = capsys.readouterr()
    assert streams.out == ""
    (line,) = streams.err.splitlines()
    assert line.startswith("ganscale: ")
    return code, line


@pytest.mark.parametrize("verb", ["tournament", "stability"])
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    assert f"Example: ganscale {verb}" in capsys.readouterr().out


def test_a_tournament_of_what_is_no_run_exits_with_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, procedural_shards: Path
) -> None:
    code, line = refusal(capsys, "tournament", tmp_path, "--reference", procedural_shards)
    assert code == 1
    assert "is not a run" in line
    assert "discriminators are in checkpoints" in line


def test_averages_of_one_run_are_compared_by_different_names(make_config: MakeConfig) -> None:
    config = make_config()
    run_dir, spec = RunDirectory(config.run_dir), config.model.model_dump() | {"base_channels": 8}
    for name in ("", "ema-2000"):
        save_snapshot(run_dir.snapshot(640, name), build_generator(spec), spec=spec, nimg=640)
    run_dir.config.write_text(config.to_yaml())
    average = run_dir.snapshots / "ema-2000"
    places = (run_dir.root, run_dir.snapshot(640), average, run_dir.snapshot(640, "ema-2000"))
    assert [load_run(str(place), InversionSettings()).name for place in places] == [
        "tiny",
        "tiny@0.64",
        "tiny/ema-2000",
        "tiny/ema-2000@0.64",
    ]


def test_a_tournament_without_test_images_exits_with_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, line = refusal(capsys, "tournament", tmp_path, "--reference", tmp_path / "absent")
    assert code == 1
    assert "absent" in line


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--report-only"], 2, "at least one run"),
        (["--report-only", "/nonexistent"], 1, "/nonexistent is not a run"),
        (["--config", "quikstart"], 2, "did you mean 'quickstart'"),
        (["--seeds", "0"], 2, "--seeds"),
        (["training.batchsize=3"], 2, "did you mean 'training.batch_size'"),
    ],
)
def test_a_stability_report_of_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    found, line = refusal(capsys, "stability", *arguments)
    assert found == code
    assert words in line


def test_seeds_are_trained_once_reported_and_compared(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    make_config: MakeConfig,
    tmp_path: Path,
    procedural_shards: Path,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    file, report = tmp_path / "tiny.yaml", tmp_path / "report.json"
    file.write_text(make_config().to_yaml())
    command = ("stability", "--config", file, "--seeds", "2", "--storage", tmp_path / "runs")
    assert run(*command, "--json", report) == 0
    first = json.loads(report.read_text())
    assert "collapsed 0 of 2" in capsys.readouterr().out
    assert [(r["name"], r["seed"]) for r in first["runs"]] == [
        ("tiny-seed-0", 0),
        ("tiny-seed-1", 1),
    ]
    assert all(r["finished"] and r["nimg"] == 160 for r in first["runs"])
    runs = [tmp_path / "runs" / r["name"] for r in first["runs"]]
    assert read_rows(runs[0] / "metrics.jsonl") != read_rows(runs[1] / "metrics.jsonl")

    assert run(*command, "--json", report) == 0
    assert json.loads(report.read_text()) == first
    assert "tiny-seed-1 is finished" in capsys.readouterr().err
    assert [event["event"] for event in read_rows(runs[0] / "events.jsonl")].count("resume") == 0

    assert run("stability", "--report-only", *runs, "--json", report) == 0
    assert json.loads(report.read_text()) == first
    capsys.readouterr()
    assert run("stability", "--report-only", *runs, "--json", "/dev/full") == 1
    assert "collapsed 0 of 2" in capsys.readouterr().out

    code, line = refusal_of_other_settings(capsys, *command, "optimizer.lr=0.001")
    assert code == 2
    assert re.search(r"other settings \(optimizer\.lr: \S+ -> 0\.001\)", line)

    arguments = (*runs, "--reference", procedural_shards, "--num", "70", "--json")
    for place, code in ((report, 0), (Path("/dev/full"), 1)):
        assert run("tournament", *arguments, place) == code
        assert "tiny-seed-0@0.16 against tiny-seed-1@0.16" in capsys.readouterr().out
    assert json.loads(report.read_text())["num_images"] == 70


def refusal_of_other_settings(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, str]:
    code = run(*arguments)
    return code, capsys.readouterr().err.splitlines()[-1]
