"""`ganscale averages` on a tiny run: the distances of the averages, and the choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ganscale.config import Config
from ganscale.evaluation.distributions.evaluate import evaluate
from ganscale.evaluation.image_sets import GeneratedImages, open_images
from ganscale.generation.snapshot import load_generator, save_snapshot
from ganscale.launch.local import train_in_process
from ganscale.metrics import extractors
from ganscale.models import build_generator
from ganscale.run_directory import RunDirectory
from ganscale.world import World, process_group
from tests.conftest import MakeConfig, Verb
from tests.support.small_extractor import SmallExtractor


@pytest.fixture
def run(make_config: MakeConfig) -> Config:
    """A run with three averages and snapshots at two positions."""
    config = make_config(
        training__ema_halflife_kimg=0.02,
        training__extra_ema_halflives_kimg=[0.002, 0.5],
        checkpoint__snapshot_every_kimg=0.08,
    )
    train_in_process(config)
    return config


def test_all_averages_are_measured_and_the_best_is_named(
    verb: Verb, run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extractors, "open_extractor", lambda name: SmallExtractor())
    file = tmp_path / "averages.json"
    options = ("--num", 80, "--seed", 7, "--json", file)
    code, out, err = verb("averages", run.run_dir, *options)
    assert code == 0, err
    values = json.loads(file.read_text())
    assert values["nimg"] == 160
    assert values["metric"] == "fd_small"
    rows = {row["name"]: row for row in values["averages"]}
    assert list(rows) == ["", "ema-0.002", "ema-0.5"]
    distances = {name: row["distance"]["value"] for name, row in rows.items()}
    best = min(distances, key=lambda name: distances[name])
    assert values["best"] == (best or "main")
    assert f"best: {best or 'main'}, {rows[best]['snapshot']}" in out
    # As `ganscale evaluate` measures each of them.
    reference = open_images(str(run.data.shards), scratch=tmp_path)
    with process_group(World()):
        for name, row in rows.items():
            path = Path(row["snapshot"])
            assert path == RunDirectory(run.run_dir).snapshot(160, name)
            samples = GeneratedImages.of_snapshot(path, 80, seed=7)
            alone = evaluate(samples, reference, SmallExtractor(), World(), metrics=["fid"])
            assert alone is not None
            expected = alone.metrics["fd_small"]
            assert row["distance"] == {
                "value": pytest.approx(expected.value),
                "low": pytest.approx(expected.low),
                "high": pytest.approx(expected.high),
            }


def test_a_position_is_chosen_as_elsewhere(
    verb: Verb, run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extractors, "open_extractor", lambda name: SmallExtractor())
    file = tmp_path / "averages.json"
    code, _, err = verb("averages", f"{run.run_dir}@0.1", "--num", 20, "--json", file)
    assert code == 0, err
    assert json.loads(file.read_text())["nimg"] == 80
    code, _, err = verb("averages", f"{run.run_dir}@0.01", "--num", 20)
    assert code == 1
    assert "the run has some at 0.08, 0.16 kimg" in err


def test_the_folder_of_an_average_means_its_newest_snapshot(run: Config) -> None:
    run_dir = RunDirectory(run.run_dir)
    path = run_dir.snapshot(160, "ema-0.5")
    expected = load_generator(path).sample(2)
    assert torch.equal(load_generator(path.parent).sample(2), expected)
    assert not torch.equal(load_generator(run_dir.root).sample(2), expected)


def test_a_run_with_one_average_has_nothing_to_choose_from(
    verb: Verb, make_config: MakeConfig
) -> None:
    config = make_config(training__total_kimg=0.032)
    train_in_process(config)
    code, _, err = verb("averages", config.run_dir)
    assert code == 2
    assert "training.extra_ema_halflives_kimg=[100, 1000]" in err


def test_a_reference_of_too_few_images_is_refused_before_the_work(
    verb: Verb, run: Config, tmp_path: Path
) -> None:
    code, _, err = verb("averages", run.run_dir, "--extractor", "efficientnet-lite0")
    assert code == 1
    assert "too few for the 1280 features of efficientnet-lite0" in err
    assert "--metrics kid" in err
    assert len(err.splitlines()) == 1


def test_an_average_that_draws_one_image_only_is_reported_and_others_are_measured(
    verb: Verb, run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extractors, "open_extractor", lambda name: SmallExtractor())
    run_dir, file = RunDirectory(run.run_dir), tmp_path / "averages.json"
    model = build_generator(run.generator_spec)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    save_snapshot(run_dir.snapshot(160, "ema-0.5"), model, spec=run.generator_spec, nimg=160)
    code, out, err = verb("averages", run.run_dir, "--num", 40, "--json", file)
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(file.read_text())["averages"]}
    assert rows["ema-0.5"]["distance"] is None
    assert "all 40 images have the same features" in rows["ema-0.5"]["problem"]
    assert "all 40 images have the same features" in out
    assert rows[""]["distance"]["value"] > 0
    for name in ("", "ema-0.002"):
        save_snapshot(run_dir.snapshot(160, name), model, spec=run.generator_spec, nimg=160)
    code, _, err = verb("averages", run.run_dir, "--num", 40)
    assert code == 1
    assert "same features" in err
