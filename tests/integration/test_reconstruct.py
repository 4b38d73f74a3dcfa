"""`ganscale reconstruct` and `compare` on tiny runs: figures, pictures, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ganscale.data.shards import ShardSet
from ganscale.errors import DataError
from ganscale.evaluation.image_sets import ImagesOfShards, open_images
from ganscale.evaluation.reconstruction.reconstruct import (
    Reconstructor,
    labels_for,
    reconstruct,
    similarity,
)
from ganscale.generation.degradations import build_degradation
from ganscale.generation.inversion import InversionSettings
from ganscale.launch.local import train_in_process
from ganscale.metrics.extractors import EfficientNetLite0
from ganscale.world import World
from tests.conftest import MakeConfig, Verb
from tests.support.ranks import run_ranks

TASKS = ["identity", "inpaint", "superres", "denoise", "deblur", "colourise"]
QUICK = ("--steps", 3, "--restarts", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, procedural_shards: Path) -> dict[str, Path]:
    """A GAN and a VAE of a few steps."""
    from ganscale.config import Config

    found = {}
    for method in ("gan", "vae"):
        config = Config().with_changes(
            {
                "name": method,
                "storage": str(tmp_path_factory.mktemp("runs")),
                "method": {"name": method},
                "data.shards": str(procedural_shards),
                "model": {"base_channels": 8, "z_dim": 16},
                "training.batch_size": 16,
                "training.total_kimg": 0.064,
                "tracking.wandb": "disabled",
                "tracking.log_every_kimg": 0.016,
                "launch.backend": "inprocess",
            }
        )
        train_in_process(config)
        (config.run_dir / "config.yaml").write_text(config.to_yaml())
        found[method] = config.run_dir
    return found


def pixels_of(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(path) as picture:
        return np.asarray(picture)


def size_of(path: Path) -> tuple[int, int]:
    height, width = pixels_of(path).shape[:2]
    return width, height


def folder_of(path: Path, num: int, *, size: int = 32, mode: str = "RGB") -> Path:
    random = np.random.default_rng(0)
    path.mkdir()
    shape = (size, size, len(mode)) if len(mode) > 1 else (size, size)
    for number in range(num):
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number:04d}.png")
    return path


@pytest.mark.parametrize(
    "task",
    [t if t == "inpaint" else pytest.param(t, marks=pytest.mark.slow) for t in TASKS],
)
def test_every_task_is_done_by_inversion_and_by_encoder(
    verb: Verb, runs: dict[str, Path], procedural_shards: Path, tmp_path: Path, task: str
) -> None:
    for method, by in (("gan", "inversion"), ("vae", "encoder")):
        out = tmp_path / method
        where = ("--images", procedural_shards, "--num", 3, "--out", out)
        options = ("--task", task, *(QUICK if by == "inversion" else ("--device", "cpu")))
        code, text, err = verb("reconstruct", runs[method], *where, *options)
        assert code == 0, err
        assert f"by       {by}" in text
        written = json.loads((out / "figures.json").read_text())
        assert written["protocol"]["by"] == by
        assert written["protocol"]["task"].split()[0] == task
        for figures in written["figures"].values():
            assert [name.split("_")[0] for name in figures] == [
                "psnr",
                "ssim",
                "perceptual",
                "feature",
            ]
            assert len(figures["psnr"]["of_each"]) == 3
        assert sorted(path.name for path in (out / "images").iterdir()) == [
            "000000.png",
            "000001.png",
            "000002.png",
        ]
        width, height = size_of(out / "grid.png")
        assert height == 3 * 66 - 2
        assert width > 3 * 66 - 2  # with "input", "reconstruction", "truth" at its left


def test_known_pixels_are_exact(verb: Verb, runs: dict[str, Path], tmp_path: Path) -> None:
    images = folder_of(tmp_path / "images", 2)
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    for name in ("000001.png", "000002.png", "000063.png", "mine.png"):  # three of an earlier call
        (out / "images" / name).write_bytes(b"")
    options = ("--task", "inpaint", "--mask", "half", *QUICK)
    place = ("--run", runs["gan"], "--images", images, "--out", out)
    code, _, err = verb("reconstruct", *place, *options)
    assert code == 0, err
    for number in range(2):
        truth = pixels_of(images / f"{number:04d}.png")
        made = pixels_of(out / "images" / f"{number:06d}.png")
        assert (made[:, :16] == truth[:, :16]).all()
        assert (made[:, 16:] != truth[:, 16:]).any()
    names = sorted(path.name for path in (out / "images").iterdir())
    assert names == ["000000.png", "000001.png", "mine.png"]


def _unfit_images(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    corrupt = folder_of(tmp_path / "corrupt", 3)
    (corrupt / "0001.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    return {
        "another size": (folder_of(tmp_path / "small", 2, size=16), "16x16 with 3 channels, the"),
        "gray": (folder_of(tmp_path / "gray", 2, mode="L"), "32x32 with 1 channels, the"),
        "RGBA": (folder_of(tmp_path / "rgba", 2, mode="RGBA"), "32x32 with 4 channels, the"),
        "corrupt": (corrupt, "0001"),
        "empty": (tmp_path / "empty", "empty"),
        "missing": (tmp_path / "nowhere", "nowhere"),
    }


def test_images_that_do_not_fit_are_refused_in_a_line(
    verb: Verb, runs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for kind, (images, reason) in _unfit_images(tmp_path).items():
        code, _, err = verb("reconstruct", runs["gan"], "--images", images, "--out", out, *QUICK)
        assert code != 0, kind
        line = err.splitlines()[-1]
        assert line.startswith("ganscale: "), kind
        assert reason in line, (kind, line)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--by", "encoder"), "has no encoder: reconstruct by inversion, or train one"),
        (("--task", "superres", "--scale", 5), "blocks of 5 pixels do not divide"),
        (("--task", "denoise", "--noise", 0), "denoising needs noise"),
        (("--task", "identity", "--noise", 9), "the task with noise alone is denoise"),
        (("--task", "inpaint", "--mask", "third"), "expected half, centre, random or a picture"),
        (("--task", "deblur", "--blur", 20), "too wide"),
        (("--run", "another"), "expected one run"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(
    verb: Verb, runs: dict[str, Path], tmp_path: Path, options: tuple[object, ...], reason: str
) -> None:
    images = folder_of(tmp_path / "images", 1)
    place = ("--images", images, "--out", tmp_path / "out")
    code, _, err = verb("reconstruct", runs["gan"], *place, *QUICK, *options)
    assert code == 2
    assert reason in err.splitlines()[-1]


def test_an_encoder_has_no_options_of_a_search(
    verb: Verb, runs: dict[str, Path], tmp_path: Path
) -> None:
    place = ("--images", folder_of(tmp_path / "images", 1), "--out", tmp_path / "out")
    for option in ("--steps", "--restarts", "--prior", "--tuning-steps"):
        code, _, err = verb("reconstruct", runs["vae"], *place, option, 1)
        assert code == 2
        assert f"{option} is for inversion" in err.splitlines()[-1]


def _reconstructed(world: World, run: Path, images: str) -> Any:
    torch.set_num_threads(1)
    search = InversionSettings(steps=2, restarts=2, pool=64)
    way = Reconstructor.load(run, search=search)
    subject = open_images(images, scratch=run)
    degradation = build_degradation("denoise", subject.shape)
    try:
        found = reconstruct(way, subject, degradation, world)
    except DataError as error:
        return str(error)
    return None if found is None else [t.numpy().tobytes() for t in vars(found).values()]


def test_any_number_of_ranks_reconstructs_the_same(runs: dict[str, Path], tmp_path: Path) -> None:
    images = folder_of(tmp_path / "images", 37)
    (alone,) = run_ranks(1, _reconstructed, runs["gan"], str(images))
    first, *others = run_ranks(3, _reconstructed, runs["gan"], str(images))
    assert others == [None, None]
    assert first == alone
    (images / "0020.png").write_bytes(b"no image")
    one, other = run_ranks(2, _reconstructed, runs["gan"], str(images))
    assert "0020" in one
    assert other == one


def test_runs_are_compared(
    verb: Verb, runs: dict[str, Path], procedural_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "compared"
    options = ("--images", procedural_shards, "--num", 3, "--num-samples", 60, "--out", out)
    tasks = ("--metric", "prdc", "--tasks", "identity,superres", *QUICK)
    (snapshot,) = (runs["gan"] / "snapshots").iterdir()
    code, text, err = verb("compare", runs["vae"], snapshot, *options, *tasks)
    assert code == 0, err
    words = [line.split()[:3] for line in text.splitlines()]
    costs = [row for row in words if row[2:] == ["0.064"]]
    assert costs == [["vae", "vae", "0.064"], ["gan@0.064", "gan", "0.064"]]
    written = json.loads((out / "figures.json").read_text())
    assert [run["name"] for run in written["runs"]] == ["vae", "gan@0.064"]
    assert all(run["seconds"] > 0 for run in written["runs"])
    assert all(run["coverage_efficientnet_lite0"]["value"] >= 0 for run in written["runs"])
    for task in ("identity", "superres x4"):
        assert [way["name"] for way in written["tasks"][task]] == [
            "trivial",
            "vae, encoder",
            "vae, inversion",
            "gan@0.064, inversion",
        ]
        width, height = size_of(out / f"{task.replace(' ', '-')}.png")
        assert height == 5 * 66 - 2
        assert width > 3 * 66 - 2  # with the names of the ways at its left


def test_a_metric_without_enough_images_is_refused_before_the_reconstructions(
    verb: Verb, runs: dict[str, Path], procedural_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "compared"
    options = ("--images", procedural_shards, "--num", 3, "--num-samples", 60, "--out", out)
    code, text, err = verb("compare", runs["gan"], *options, "--metric", "kid", *QUICK)
    assert (code, text) == (1, "")
    assert "kid: the samples: 60 images are too few" in err.splitlines()[-1]


def test_only_images_that_networks_take_have_their_distances() -> None:
    network = EfficientNetLite0()
    images = torch.randint(0, 256, (2, 4, 32, 32), dtype=torch.uint8)
    assert list(similarity(images, images, network, network)) == ["psnr", "ssim"]
    gray = images[:, :1]
    found = similarity(gray, gray, network, network)
    assert [float(values[0]) for values in found.values()] == pytest.approx([100, 1, 0, 0])


def test_a_comparison_needs_runs(verb: Verb, tmp_path: Path, procedural_shards: Path) -> None:
    options = ("--images", procedural_shards, "--out", tmp_path / "out")
    code, _, err = verb("compare", tmp_path / "nothing", *options)
    assert code == 1
    assert "no snapshot at" in err.splitlines()[-1]


def test_the_labels_of_a_set_are_given_to_a_generator_with_its_classes(
    make_config: MakeConfig, procedural_shards: Path, tmp_path: Path
) -> None:
    model = {"name": "biggan", "base_channels": 4, "z_dim": 12, "num_classes": 10}
    config = make_config(model=model, training__total_kimg=0.016)
    train_in_process(config)
    way = Reconstructor.load(config.run_dir, search=InversionSettings(steps=2, restarts=2, pool=64))
    images = ImagesOfShards(ShardSet.load(procedural_shards))
    assert images.labels is not None
    truth = images.read(np.arange(3)).float() / 127.5 - 1
    labels = labels_for(way.generator, images, np.arange(3))
    assert labels is not None
    assert labels.tolist() == images.labels[:3].tolist()
    degradation = build_degradation("identity", images.shape)
    assert torch.equal(way(degradation, truth, labels, lambda _: None).labels, labels)
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "two" / name / "1.png")
    of_two = open_images(str(tmp_path / "two"), scratch=tmp_path)
    assert of_two.labels is not None
    with pytest.raises(DataError, match="classes that the generator lacks: a, b"):
        labels_for(way.generator, of_two, np.arange(2))
