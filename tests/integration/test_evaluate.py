"""`ganscale evaluate` on folders, snapshots and runs: figures, files, and one-line errors."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ganscale.evaluation.distributions import evaluate as distributions
from ganscale.evaluation.distributions.evaluation import Evaluation, Protocol
from ganscale.evaluation.gan_metrics import classifier_metrics
from ganscale.evaluation.gan_metrics.two_sample import SHORT_TEST
from ganscale.launch.local import train_in_process
from ganscale.metrics.intervals import Estimate
from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig, Verb
from tests.support.runs import read_rows


def folder_of(path: Path, num: int, seed: int, size: int = 32) -> Path:
    random = np.random.default_rng(seed)
    path.mkdir()
    for number in range(num):
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number:04d}.png")
    return path


def test_two_folders_are_compared(verb: Verb, tmp_path: Path) -> None:
    a, b = folder_of(tmp_path / "a", 60, 0), folder_of(tmp_path / "b", 60, 1)
    file = tmp_path / "figures.json"
    options = ("--metrics", "prdc,c2st_1nn", "--json", file)
    code, out, err = verb("evaluate", "--images", a, "--reference", b, *options)
    assert code == 0, err
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["protocol"]["extractor"] == "efficientnet-lite0"
    assert found["protocol"]["num_samples"] == 60
    names = ["precision", "recall", "density", "coverage", "c2st_1nn"]
    assert list(found["metrics"]) == [f"{name}_efficientnet_lite0" for name in names]
    for value in found["metrics"].values():
        assert value["low"] <= value["value"] <= value["high"]
    assert "features   efficientnet-lite0, bicubic to 96x96" in out
    assert "recall_efficientnet_lite0" in out
    assert "95 % interval         better\nprecision_eff" in out
    _, again, _ = verb("evaluate", "--images", a, "--reference", b, *options)
    assert again.splitlines()[:-1] == out.splitlines()[:-1]  # the last one is how long it took


@pytest.fixture
def run_dir(make_config: MakeConfig) -> RunDirectory:
    config = make_config()
    train_in_process(config)
    RunDirectory(config.run_dir).config.write_text(config.to_yaml())
    return RunDirectory(config.run_dir)


def test_a_run_gets_a_row_of_what_was_measured(verb: Verb, run_dir: RunDirectory) -> None:
    options = ("--num", 64, "--num-reference", 64, "--metrics", "prdc")
    code, out, err = verb("evaluate", "--run", run_dir.root, *options)
    assert code == 0, err
    assert "64 samples of" in out
    row = read_rows(run_dir.metrics)[-1]
    assert row["nimg"] == 160
    assert row["attempt"] == 1
    assert 0 <= row["metrics/precision_efficientnet_lite0"] <= 1
    event = read_rows(run_dir.events)[-1]
    assert event["event"] == "evaluation"
    assert event["protocol"]["num_reference"] == 64
    (snapshot,) = run_dir.snapshots.glob("*.safetensors")
    code, again, err = verb("evaluate", "--snapshot", snapshot, *options)
    assert code == 0, err
    assert again.splitlines()[5:9] == out.splitlines()[5:9]
    assert read_rows(run_dir.metrics)[-1] == row


def test_a_split_that_shards_do_not_have_is_refused(verb: Verb, run_dir: RunDirectory) -> None:
    options = ("--run", run_dir.root, "--num", 20, "--num-reference", 20, "--metrics", "prdc")
    code, out, err = verb("evaluate", *options, "--split", "test")
    assert (code, out) == (2, "")
    assert "is a shard set of the train split" in err
    code, _, err = verb("evaluate", *options, "--split", "train")
    assert code == 0, err


def test_neither_file_is_lost_where_the_other_cannot_be_written(
    verb: Verb, run_dir: RunDirectory, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    options = ("--num", 20, "--num-reference", 20, "--metrics", "prdc", "--json")
    command = ("evaluate", "--run", run_dir.root, *options)
    code, _, err = verb(*command, run_dir.root)
    assert (code, "a folder is where a file should be" in err) == (1, True)
    assert "metrics/recall_efficientnet_lite0" in read_rows(run_dir.metrics)[-1]
    run_dir.events.unlink()
    run_dir.events.mkdir()
    code, _, err = verb(*command, file)
    assert (code, "a folder is where a file should be" in err) == (1, True)
    assert "recall_efficientnet_lite0" in json.loads(file.read_text())["metrics"]


def test_classifiers_judge_too(
    verb: Verb, run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(classifier_metrics, "SHORT_TEST", replace(SHORT_TEST, num_passes=2000))
    monkeypatch.setattr(classifier_metrics, "_NUM_SEEDS", 2)
    options = ("--num", 60, "--num-reference", 60, "--metrics", "c2st", "--json", tmp_path / "x")
    code, out, err = verb("evaluate", "--run", run_dir.root, *options)
    assert code == 0, err
    assert "c2st" in out
    found = json.loads((tmp_path / "x").read_text())
    assert found["metrics"]["c2st"]["value"] > 0.8  # of a generator that has hardly learned
    assert len(found["details"]["c2st"]["repeats"]) == 2
    code, _, err = verb("evaluate", "--run", run_dir.root, "--num", 60, "--metrics", "cas")
    assert (code, err.splitlines()[-1][:24]) == (2, "ganscale: cas needs real")


def test_the_other_metrics_are_shown_when_one_fails(
    verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(distributions, "mean_neighbour_accuracy", fail)
    monkeypatch.setattr(classifier_metrics, "network_two_sample", fail)
    a, b = folder_of(tmp_path / "a", 30, 0), folder_of(tmp_path / "b", 30, 1)
    options = ("--metrics", "c2st_1nn,prdc,c2st", "--json", tmp_path / "figures.json")
    code, out, err = verb("evaluate", "--images", a, "--reference", b, *options)
    assert code == 1
    assert err.splitlines()[-1] == "ganscale: c2st_1nn: no room; c2st: no room"
    assert "recall_efficientnet_lite0" in out
    found = json.loads((tmp_path / "figures.json").read_text())
    assert "recall_efficientnet_lite0" in found["metrics"]
    assert found["skipped"] == {"c2st_1nn": "no room", "c2st": "no room"}


def test_labels_for_classifiers_are_missed_before_anything_is_measured(
    verb: Verb, run_dir: RunDirectory, procedural_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributions, "extract", None)
    options = ("--num", 60, "--metrics", "prdc,cas", "--test", procedural_shards)
    code, out, err = verb("evaluate", "--run", run_dir.root, *options)
    assert (code, out) == (2, "")
    assert "the classification accuracy score needs labels" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "expected one of --run, --snapshot and --images"),
        (["--run", "x", "--images", "y"], 2, "expected one of --run, --snapshot and --images"),
        (["--images", "."], 2, "give --reference"),
        (["--images", "a", "--reference", "b", "--metrics", "fad"], 2, "expected some of fid"),
        (["--images", "a", "--reference", "b", "--metrics", "frechet"], 2, "is now called fid"),
        (
            ["--images", "a", "--reference", "a", "--reference-rows", 9, "--metrics", "fid"],
            2,
            "add",
        ),
        (["--images", "absent", "--reference", "a"], 1, "no such image source"),
        (["--images", "a", "--reference", "a", "--metrics", "fid"], 1, "are too few for 1280"),
        (["--images", "a", "--reference", "small"], 1, "only images of one shape"),
        (["--images", "a", "--reference", "empty"], 1, "empty"),
        (["--images", "a", "--reference", "a", "--extractor", "inception-v3"], 2, "no weights at"),
    ],
)
def test_errors_are_one_line(
    verb: Verb,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GANSCALE_INCEPTION", "nowhere.pth")
    folder_of(tmp_path / "a", 12, 0)
    folder_of(tmp_path / "small", 12, 0, size=16)
    (tmp_path / "empty").mkdir()
    extractor = [] if "--extractor" in arguments else ["--extractor", "efficientnet-lite0"]
    found, out, err = verb("evaluate", *arguments, *extractor)
    assert (found, out) == (code, "")
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("column", "num_samples", "statistics", "words"),
    [
        ("fid", 10_000, "CIFAR-10's training images", "lower: its test images 3.15, StyleGAN2-ADA"),
        ("fid", 2_000, "CIFAR-10's training images", "lower; too high by its bias: fewer than"),
        ("fid", 10_000, "extracted", "lower"),
        ("fd_dinov2", 10_000, "extracted", "lower"),
        ("coverage", 2_000, "extracted", "higher"),
    ],
)
def test_the_table_says_what_is_better(
    column: str, num_samples: int, statistics: str, words: str
) -> None:
    protocol = Protocol(
        extractor="x",
        extractor_digest="x",
        resizer="x",
        samples="x",
        num_samples=num_samples,
        reference="x",
        reference_digest="x",
        num_reference=50_000,
        reference_statistics=statistics,
        num_reference_rows=0,
    )
    table = repr(Evaluation(protocol, {column: Estimate(45.5, 44, 47)}, {}))
    row = next(line for line in table.splitlines() if line.startswith(column))
    assert re.fullmatch(rf"{column} +45.5  44 to 47 +{words}.*", row)
    if words in ("lower", "higher"):
        assert row.endswith(words)
