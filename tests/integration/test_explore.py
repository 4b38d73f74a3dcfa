"""The verbs that explore, on tiny snapshots of all architectures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ganscale.cli import explore
from ganscale.config.models import (
    BigganModel,
    DcganModel,
    R3ganModel,
    SndcganModel,
    SnganModel,
    Stylegan2Model,
)
from ganscale.generation.snapshot import load_generator, save_snapshot
from ganscale.metrics.extractors import EfficientNetLite0
from ganscale.models import build_generator
from ganscale.world import World
from tests.conftest import Verb

MODELS = {
    "dcgan": DcganModel(z_dim=16, base_channels=8),
    "sndcgan": SndcganModel(z_dim=16, base_channels=8, num_classes=3),
    "sngan": SnganModel(z_dim=16, base_channels=8, num_classes=3),
    "biggan": BigganModel(z_dim=16, base_channels=8, num_classes=3),
    "r3gan": R3ganModel(z_dim=16, base_channels=16, num_classes=3, blocks_per_stage=1),
    "stylegan2": Stylegan2Model(z_dim=16, base_channels=16, num_classes=3),
}


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots")
    for name, model in MODELS.items():
        spec = model.model_dump()
        save_snapshot(folder / f"{name}.safetensors", build_generator(spec), spec=spec, nimg=0)
    return folder


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.mark.parametrize("name", MODELS)
def test_strips_and_directions_of_each_architecture(
    verb: Verb, snapshots: Path, tmp_path: Path, name: str
) -> None:
    snapshot, out = snapshots / f"{name}.safetensors", tmp_path / "a" / "picture.png"
    code, text, err = verb("interpolate", snapshot, "--frames", 4, "--out", out)
    assert code == 0, err
    assert "wrote 9 frames" in text
    assert size_of(out) == (5 * 66 - 2, 2 * 66 - 2)  # two rows from seed to seed
    code, text, err = verb(
        "directions", snapshot, "--num", 2, "--seeds", "0,1", "--steps", 3, "--out", out
    )
    assert code == 0, err
    assert len(text.splitlines()) == 4
    width, height = size_of(out)
    # With labels of directions and strengths at the edges.
    assert width > 3 * 66 - 2
    assert 4 * 66 - 2 < height < 5 * 66
    code, _, err = verb("sample", snapshot, "--num", 4, "--truncation-psi", 0.5, "--out", out)
    assert code == 0, err


@pytest.mark.parametrize(("ending", "kind"), [(".gif", "GIF"), (".webp", "WEBP"), (".apng", "PNG")])
def test_animations_have_all_frames(
    verb: Verb, snapshots: Path, tmp_path: Path, ending: str, kind: str
) -> None:
    out = tmp_path / f"movie{ending}"
    arguments = ("--seeds", "1,2,3", "--frames", 3, "--loop", "--scale", 1, "--out", out)
    code, text, err = verb("interpolate", snapshots / "dcgan.safetensors", *arguments)
    assert code == 0, err
    assert "wrote 9 frames" in text
    with Image.open(out) as movie:
        assert movie.format == kind
        assert movie.n_frames == 9  # type: ignore[attr-defined]
        assert movie.size == (32, 32)


@pytest.mark.parametrize("name", ["sndcgan", "sngan", "biggan", "r3gan", "stylegan2"])
def test_classes_are_passed_through(verb: Verb, snapshots: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "classes.png"
    arguments = ("--mode", "class", "--seeds", "7,8", "--frames", 2, "--scale", 1, "--out", out)
    code, text, err = verb("interpolate", snapshots / f"{name}.safetensors", *arguments)
    assert code == 0, err
    assert "wrote 5 frames" in text
    assert size_of(out) == (5 * 34 - 2, 2 * 34 - 2)


def test_styles_are_mixed(verb: Verb, snapshots: Path, tmp_path: Path) -> None:
    out = tmp_path / "mix.png"
    arguments = ("--rows", "0,1,2", "--columns", "3,4,5,6", "--layer", 2, "--scale", 1)
    code, _, err = verb("mix", snapshots / "stylegan2.safetensors", *arguments, "--out", out)
    assert code == 0, err
    assert size_of(out) == (5 * 34 - 2, 4 * 34 - 2)


def test_a_copy_of_a_training_image_is_seen(verb: Verb, snapshots: Path, tmp_path: Path) -> None:
    snapshot = snapshots / "sngan.safetensors"
    reference = tmp_path / "reference"
    reference.mkdir()
    copy = load_generator(snapshot).sample(1, seed=1)[0].movedim(0, -1).numpy()
    random = np.random.default_rng(0)
    for number in range(20):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(copy if number == 13 else pixels).save(reference / f"{number:02d}.png")
    out = tmp_path / "nearest.png"
    options = ("--reference", reference, "--num", 2, "--neighbours", 3, "--scale", 1, "--out", out)
    code, text, err = verb("nearest", snapshot, *options)
    assert code == 0, err
    rows = [line.split() for line in text.splitlines()[1:3]]
    assert [row[0] for row in rows] == ["0", "1"]
    assert float(rows[1][2]) < 0.01
    assert float(rows[1][4]) == 0
    with Image.open(out) as picture:
        assert picture.size == (9 * 34 - 2, 2 * 34 - 2)
        shown = np.asarray(picture)
    assert (shown[34:66, 68:100] == copy).all()
    assert (shown[34:66, 204:236] == copy).all()


def test_neighbours_are_sought_on_the_device_with_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As far as it comes where there is no such device."""

    def group(world: World) -> None:
        raise RuntimeError(f"a group on {world.device} of {world.world_size}")

    monkeypatch.setattr(explore, "process_group", group)
    monkeypatch.setattr(explore, "_reference", lambda *_: None)
    monkeypatch.setattr(EfficientNetLite0, "to", lambda network, device: network)
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="a group on cuda:1 of 1"):
        explore._neighbours(images, "images", 2, 1, "cuda:1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("interpolate", "dcgan", "--mode", "class"), "has no classes"),
        (("interpolate", "dcgan", "--seeds", "1"), "a path needs 2 points"),
        (("interpolate", "dcgan", "--seeds", "1,x"), "--seeds 1,x: expected numbers"),
        (("interpolate", "dcgan", "--out", "a.jpg"), "expected .png, .gif, .webp, .apng"),
        (("interpolate", "biggan", "--label", 9), "takes 0 to 2"),
        (("mix", "biggan"), "biggan has no styles w"),
        (("mix", "stylegan2", "--layer", 20), "this generator has layers 0 to 8"),
        (("directions", "dcgan", "--num", 99), "expected 1 to 16"),
        (("sample", "stylegan2", "--truncation-psi", 2), "takes 0 to 1"),
    ],
)
def test_wrong_use_is_one_line(
    verb: Verb, snapshots: Path, arguments: tuple[object, ...], message: str
) -> None:
    command, name, *options = arguments
    code, _, err = verb(command, snapshots / f"{name}.safetensors", *options)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
