"""`ganscale averages` on a tiny run: the distances of the averages, in pairs, and the choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ganscale.config import Config
from ganscale.errors import DataError
from ganscale.evaluation.distributions.averages import compare_averages
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
    assert "240 samples + 500 reference images at " in err
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
            assert row["above_best"]["value"] == pytest.approx(expected.value - distances[best])
    assert rows[best]["above_best"] == {"value": 0.0, "low": 0.0, "high": 0.0}


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
    procedural_shards: Path, tmp_path: Path
) -> None:
    spec = {
        "name": "dcgan",
        "resolution": 32,
        "img_channels": 3,
        "num_classes": 0,
        "z_dim": 4,
        "base_channels": 4,
    }
    torch.manual_seed(0)
    model = build_generator(spec)
    paths = {"": tmp_path / "a.safetensors", "ema-1": tmp_path / "b.safetensors"}
    save_snapshot(paths[""], model, spec=spec, nimg=0)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    save_snapshot(paths["ema-1"], model, spec=spec, nimg=0)
    reference = open_images(str(procedural_shards), scratch=tmp_path)
    with process_group(World()):
        comparison = compare_averages(paths, reference, SmallExtractor(), World(), num_images=40)
        assert comparison is not None
        lively, dead = comparison.results
        assert comparison.best is lively
        assert dead.distance is None
        assert "all 40 images have the same features" in dead.problem
        del paths[""]
        with pytest.raises(DataError, match="same features"):
            compare_averages(paths, reference, SmallExtractor(), World(), num_images=40)
