"""A run measures itself: rows, the best snapshot and checkpoints, and nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config
from ganscale.data.shards import ShardSet
from ganscale.errors import ConfigError, DataError
from ganscale.generation.snapshot import load_generator
from ganscale.run_directory import RunDirectory
from ganscale.training import evaluator, loop
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.ranks import run_ranks
from tests.support.runs import final_digest, read_rows
from tests.support.small_extractor import SmallExtractor

SETTINGS: dict[str, Any] = {
    "training__total_kimg": 0.64,
    "evaluation__every_kimg": 0.16,
    "evaluation__num_images": 120,
    "evaluation__metrics": ["fid", "prdc"],
    "checkpoint__every_kimg": 0.16,
    "checkpoint__best_metric": "fid",
    "checkpoint__keep_best": 1,
    "checkpoint__keep_last": 2,
}


def _train(world: World, config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "open_extractor", lambda name: SmallExtractor())
        patch.setenv("GANSCALE_CACHE", str(config.run_dir.parent / "cache"))
        loop.train(config, world)


def trained(config: Config, world_size: int = 1) -> list[dict[str, Any]]:
    """The rows of a run that have an evaluation."""
    run_ranks(world_size, _train, config.with_changes({"launch.num_workers": world_size}))
    rows = read_rows(RunDirectory(config.run_dir).metrics)
    return [row for row in rows if "metrics/fd_small" in row]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_measures_itself_and_keeps_its_best(make_config: MakeConfig, world_size: int) -> None:
    settings = {
        **SETTINGS,
        "evaluation__metrics": ["fid", "prdc", "fid_per_class"],
        "evaluation__num_images": 400,
    }
    config = make_config(model__name="sndcgan", model__num_classes=10, **settings)
    rows = trained(config, world_size)
    assert [row["nimg"] for row in rows] == [160, 320, 480, 640]
    for row in rows:
        assert row["metrics/fd_small"] > 0
        assert 0 <= row["metrics/recall_small"] <= 1
        assert row["metrics/fd_per_class_small"] > 0
        assert row["time/evaluation_seconds"] > 0
    best = min(rows, key=lambda row: row["metrics/fd_small"])["nimg"]
    (snapshot,) = (RunDirectory(config.run_dir).snapshots / "best").iterdir()
    assert load_generator(snapshot).info["nimg"] == best
    assert sum(load_generator(snapshot).class_counts) == 500
    kept = {name.nimg for name in CheckpointStore(config.checkpoints).names()}
    assert kept >= {480, 640, best}


def test_measuring_changes_nothing_that_is_trained(make_config: MakeConfig) -> None:
    with_it = make_config(name="with", **SETTINGS)
    trained(with_it)
    without = make_config(name="without", training__total_kimg=0.64)
    trained(without)
    assert final_digest(with_it) == final_digest(without)


def test_a_resumed_run_measures_what_the_whole_one_does(make_config: MakeConfig) -> None:
    whole = trained(make_config(name="whole", **SETTINGS))
    half = {**SETTINGS, "training__total_kimg": 0.32}
    trained(make_config(name="half", **half))
    resumed = trained(make_config(name="half", **SETTINGS))
    figures = [[row["metrics/fd_small"] for row in rows] for rows in (whole, resumed)]
    assert figures[0] == figures[1]


def _train_measured(world: World, config: Config, distances: dict[int, float]) -> None:
    def measure(self: evaluator.Evaluator, model: Any, nimg: int, **_: Any) -> evaluator.Measured:
        return evaluator.Measured({"metrics/fd_small": distances[nimg]}, distances[nimg], "", {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "measure", measure)
        _train(world, config)


@pytest.mark.parametrize(("num_images", "best"), [(120, 160), (150, 480)])
def test_distances_that_were_measured_otherwise_are_not_compared(
    make_config: MakeConfig, num_images: int, best: int
) -> None:
    config = make_config(**{**SETTINGS, "training__total_kimg": 0.32})
    run_ranks(1, _train_measured, config, {160: 1.0, 320: 2.0})
    changes = {"training.total_kimg": 0.8, "evaluation.num_images": num_images}
    config = config.with_changes(changes)
    run_ranks(1, _train_measured, config, {480: 4.0, 640: 5.0, 800: 6.0})
    (snapshot,) = (RunDirectory(config.run_dir).snapshots / "best").iterdir()
    assert load_generator(snapshot).info["nimg"] == best
    kept = {name.nimg for name in CheckpointStore(config.checkpoints).names()}
    assert kept & {160, 480} == {best}


def test_images_that_are_all_alike_are_told_and_training_goes_on(
    make_config: MakeConfig,
) -> None:
    config = make_config(**{**SETTINGS, "evaluation__metrics": ["fid"]})
    run_ranks(1, _train_blind, config)
    run_dir = RunDirectory(config.run_dir)
    failed = [row for row in read_rows(run_dir.events) if row["event"] == "evaluation_failed"]
    assert len(failed) == 4
    assert "have the same features" in failed[0]["message"]
    assert read_rows(run_dir.metrics)[-1]["nimg"] == 640
    assert math.isfinite(read_rows(run_dir.metrics)[-1]["train/loss_D"])


def _train_blind(world: World, config: Config) -> None:
    def features(self: SmallExtractor, images: Any) -> Any:
        return images.float()[:, :1, 0, :8].reshape(len(images), 8) * 0 + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SmallExtractor, "features", features)
        _train(world, config)


@pytest.mark.parametrize(
    ("num_images", "size", "settings", "words"),
    [
        (5, 32, {}, "fid: the reference: 5 images are too few for 8 features.*; prdc: 5"),
        (7, 32, {"checkpoint__best_metric": "fid"}, "fid: the reference: 7 images are too few"),
        (20, 16, {}, r"shape \(3, 32, 32\), 20 images of .* \(3, 16, 16\): only images of one"),
    ],
)
def test_a_reference_that_nothing_can_be_measured_by_is_refused_at_the_start(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_images: int,
    size: int,
    settings: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.setattr(evaluator, "open_extractor", lambda name: SmallExtractor())
    reference = tmp_path / "reference"
    reference.mkdir()
    for number in range(num_images):
        Image.new("RGB", (size, size)).save(reference / f"{number}.png")
    config = make_config(
        evaluation__every_kimg=0.16,
        evaluation__metrics=["fid", "prdc"],
        evaluation__reference=str(reference),
        **settings,
    )
    world = World()
    with process_group(world), pytest.raises(DataError, match=words):
        evaluator.Evaluator(config, ShardSet.load(config.data.shards or ""), world)


def test_the_best_by_a_distance_needs_evaluations(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"best_metric=fid needs evaluations: set eval"):
        make_config(checkpoint__best_metric="fid")
