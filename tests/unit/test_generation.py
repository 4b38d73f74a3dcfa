"""Latents, snapshots and samples."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ganscale
from ganscale.config.models import DcganModel, SnganModel
from ganscale.data.values import PIXELS, ValueRange
from ganscale.errors import CheckpointError
from ganscale.generation.latents import (
    draw_noise,
    normal,
    seed_for,
    seeded_labels,
    seeded_labels_by_count,
    seeded_latents,
    uniform,
)
from ganscale.generation.pictures import (
    as_pictures,
    cubehelix,
    label_sheet,
    magnification,
    save_grid,
)
from ganscale.generation.sampler import SampleableGenerator, diversity, rows_per_forward, to_uint8
from ganscale.generation.snapshot import load_generator, save_generator, save_snapshot
from ganscale.models import build_discriminator, build_generator
from tests.support.devices import on_each_device

SPEC = DcganModel(z_dim=16, base_channels=8).model_dump()
CPU = torch.device("cpu")


def latents(
    seed: int = 0, position: int = 0, purpose: str = "D", *, batch_size: int = 4
) -> torch.Tensor:
    noise = draw_noise(
        {purpose: normal(8)},
        seed=seed,
        position=position,
        batch_size=batch_size,
        slots=torch.arange(batch_size),
    )
    return noise[purpose]


def test_ranks_slice_what_one_process_would_draw() -> None:
    slots = torch.tensor([1, 3, 5])
    draws = {"D": normal(4, 2), "wgan_gp": uniform(1)}
    place = {"seed": 1, "position": 640, "batch_size": 10}
    whole = draw_noise(draws, slots=torch.arange(10), **place)
    part = draw_noise(draws, slots=slots, **place)
    for name in draws:
        assert torch.equal(part[name], whole[name][slots])


def test_latents_differ_by_seed_position_and_purpose() -> None:
    draws = [latents(), latents(seed=1), latents(position=4), latents(purpose="G")]
    for i, one in enumerate(draws):
        for other in draws[i + 1 :]:
            assert not torch.equal(one, other)


def test_latents_are_standard_normal() -> None:
    z = latents(batch_size=16384)
    assert abs(z.mean().item()) < 0.01
    assert abs(z.std().item() - 1) < 0.01


def test_a_seeds_latent_does_not_depend_on_its_neighbours() -> None:
    torch.testing.assert_close(
        seeded_latents([5, 4711], 8)[1], seeded_latents([4711], 8)[0], rtol=0, atol=0
    )


def test_numbers_of_numpy_are_the_seeds_that_they_are() -> None:
    numbers = list(np.arange(4, dtype=np.int32))
    assert torch.equal(seeded_latents(numbers, 8), seeded_latents([0, 1, 2, 3], 8))
    assert torch.equal(seeded_labels(numbers, 10), seeded_labels([0, 1, 2, 3], 10))


@on_each_device
def test_a_seeds_image_does_not_depend_on_its_batch(device: str) -> None:
    torch.manual_seed(0)
    generator = SampleableGenerator(build_generator(SPEC).to(device), spec=SPEC, info={})
    alone = generator.sample_seeds([4711])[0]
    for others in (3, 16, 33, *([511, 700] if device != "cpu" else [])):
        images = generator.sample_seeds([*range(others), 4711])
        assert torch.equal(images[-1], alone)


def test_forwards_have_as_many_rows_as_the_device_is_for() -> None:
    sides = (16, 32, 64, 128, 256, 1024)
    assert [rows_per_forward("cuda", side) for side in sides] == [512, 512, 128, 32, 16, 16]
    assert {rows_per_forward("cpu", side) for side in sides} == {16}


def test_a_seed_decides_the_label_unless_one_is_asked_for() -> None:
    torch.manual_seed(0)
    spec = SnganModel(z_dim=8, base_channels=8, num_classes=10, resolution=16).model_dump()
    model = build_generator(spec)
    for block in model.blocks:  # type: ignore[union-attr]
        torch.nn.init.normal_(block.norm1.norm.bias.weight)
    generator = SampleableGenerator(model, spec=spec, info={})
    seeds = list(range(6))
    labels = seeded_labels(seeds, 10).tolist()
    assert len(set(labels)) > 1
    drawn = generator.sample(6)
    for seed, label in zip(seeds, labels, strict=True):
        assert torch.equal(generator.sample(1, seed=seed, label=label)[0], drawn[seed])
    assert not torch.equal(generator.sample(6, label=0), generator.sample(6, label=1))
    with pytest.raises(ValueError, match="takes 0 to 9"):
        generator.sample(1, label=10)


def test_to_uint8_covers_the_range_and_clamps() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert to_uint8(images).tolist() == [0, 0, 128, 255, 255]


def test_snapshot_round_trip_gives_the_same_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_generator(SPEC)
    path = tmp_path / "snapshots" / "nimg-1.safetensors"
    save_snapshot(path, model, spec=SPEC, nimg=1)
    expected = SampleableGenerator(model, spec=SPEC, info={}).sample(5, seed=3)
    loaded = ganscale.Generator.from_pretrained(path)
    assert torch.equal(loaded.sample(5, seed=3), expected)
    assert torch.equal(ganscale.Generator.from_pretrained(tmp_path).sample(5, seed=3), expected)
    assert loaded.info["model"] == SPEC


def test_a_snapshot_keeps_what_its_arrays_hold(tmp_path: Path) -> None:
    """Samples come in the units of the set: half way between the ends is the network's 0."""
    torch.manual_seed(0)
    spec = {**SPEC, "img_channels": 1}
    model, decibels = build_generator(spec), ValueRange("float32", -80.0, 0.0)
    save_snapshot(tmp_path / "a.safetensors", model, spec=spec, nimg=1, values=decibels)
    save_snapshot(tmp_path / "b.safetensors", model, spec=spec, nimg=1)
    loaded = ganscale.Generator.from_pretrained(tmp_path / "a.safetensors")
    assert loaded.values == decibels
    assert loaded.info["values"] == {"dtype": "float32", "low": -80.0, "high": 0.0}
    arrays = loaded.sample(3, seed=5)
    assert arrays.dtype == torch.float32
    with torch.no_grad():
        images = model.eval()(seeded_latents([5, 6, 7], 16))
    torch.testing.assert_close(arrays, 40 * images - 40)
    pixels = ganscale.Generator.from_pretrained(tmp_path / "b.safetensors")
    assert "values" not in pixels.info
    assert pixels.sample(3).dtype == torch.uint8


def test_arrays_are_as_different_as_the_pixels_they_would_be() -> None:
    decibels = ValueRange("float32", -80.0, 0.0)
    pixels = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    arrays = pixels.float() / 255 * 80 - 80
    assert diversity(arrays, decibels) == pytest.approx(diversity(pixels), rel=1e-5)


def test_colours_get_brighter_evenly() -> None:
    """Perceived light, by the weights of NTSC as in the paper, is the number itself."""
    shares = torch.linspace(0, 1, 256)
    colours = cubehelix(shares)
    assert colours[[0, -1]].tolist() == [[0, 0, 0], [255, 255, 255]]
    assert len(colours.unique(dim=0)) > 250
    light = colours.float() @ torch.tensor([0.30, 0.59, 0.11]) / 255
    torch.testing.assert_close(light, shares, rtol=0, atol=0.004)


def test_pictures_of_arrays_are_in_colours_and_clipped() -> None:
    decibels = ValueRange("float32", -80.0, 0.0)
    arrays = torch.tensor([-200.0, -80, -40, 0, 9]).reshape(1, 1, 1, 5)
    picture = as_pictures(arrays, decibels)
    expected = cubehelix(torch.tensor([0, 0, 128 / 255, 1, 1]))
    assert torch.equal(picture[0, :, 0].T, expected)
    three = as_pictures(arrays.expand(1, 3, 1, 5), decibels)
    assert three[0, :, 0].tolist() == [[0, 0, 128, 255, 255]] * 3
    gray = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert as_pictures(gray, PIXELS) is gray


@pytest.mark.parametrize("content", [b"", b"not a snapshot", b"\x08" + bytes(100)])
def test_damaged_snapshot_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.safetensors is not a readable snapshot"):
        ganscale.Generator.from_pretrained(path)


def snapshot(path: Path) -> Path:
    torch.manual_seed(0)
    save_snapshot(path, build_generator(SPEC), spec=SPEC, nimg=1)
    return path


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_weights_with_one_other_byte_are_refused(tmp_path: Path, where: float) -> None:
    path = snapshot(tmp_path / "flipped.safetensors")
    data = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(data[:8], "little")
    data[first + int(where * (len(data) - 1 - first))] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"flipped\.safetensors .* do not have the sha256"):
        ganscale.Generator.from_pretrained(path)


def test_a_snapshot_of_an_earlier_version_has_no_sha256_and_loads(tmp_path: Path) -> None:
    path = snapshot(tmp_path / "new.safetensors")
    with safe_open(path, framework="pt") as stored:
        info = json.loads(stored.metadata()["ganscale"])
    del info["sha256"]
    old = tmp_path / "old.safetensors"
    save_file(load_file(path), old, metadata={"ganscale": json.dumps(info)})
    images = ganscale.Generator.from_pretrained(old).sample(2)
    assert torch.equal(images, ganscale.Generator.from_pretrained(path).sample(2))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_a_snapshot_has_the_permissions_that_the_umask_gives(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        path = snapshot(tmp_path / "snapshot.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_grid_shows_the_pixels(tmp_path: Path) -> None:
    images = torch.arange(4, dtype=torch.uint8).mul(60)[:, None, None, None].expand(4, 3, 8, 8)
    save_grid(images, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (19, 19)
        assert [grid.getpixel((x, y))[0] for y in (4, 13) for x in (4, 13)] == [0, 60, 120, 180]  # type: ignore[index]


@pytest.mark.parametrize(("resolution", "channels"), [(16, 1), (32, 3), (64, 4)])
def test_dcgan_shapes_and_range(resolution: int, channels: int) -> None:
    spec = {**SPEC, "resolution": resolution, "img_channels": channels}
    images = build_generator(spec)(torch.randn(2, 16))
    assert images.shape == (2, channels, resolution, resolution)
    assert images.abs().max() <= 1
    assert build_discriminator(spec)(images).shape == (2,)


def test_a_grid_fills_a_screen_by_whole_pixels(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    save_grid(images, tmp_path / "plain.png")
    save_grid(images, tmp_path / "large.png", scale=None)
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "large.png") as large:
        assert plain.size == (265, 265)
        assert large.size == (3 * 265, 3 * 265)
        assert large.resize(plain.size, Image.Resampling.NEAREST).tobytes() == plain.tobytes()
    assert [magnification(1, n) for n in (10, 128, 129, 1024, 5000)] == [8, 8, 7, 1, 1]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_labels_stand_beside_a_sheet_that_stays_as_it_is(channels: int) -> None:
    sheet = torch.randint(0, 256, (channels, 80, 60), dtype=torch.uint8)
    labelled = label_sheet(sheet, ["input", "truth"], ["-1", "+1"])
    assert labelled.shape[0] == (4 if channels == 4 else 3)
    top, left = labelled.shape[1] - 80, labelled.shape[2] - 60
    assert top > 0
    assert left > 0
    inner = labelled[:channels, top:, left:]
    assert torch.equal(inner, sheet)
    # Text on white: in the middle of each row, left, and above each column.
    margin = labelled[:3, top:, :left].float().amin(0)
    for row in (margin[:40], margin[40:]):
        assert row.min() < 100
        ink = (row < 128).nonzero()[:, 0].float().mean()
        assert 12 < ink < 28
    above = labelled[:3, :top, left:].float().amin(0)
    assert min(above[:, :30].min(), above[:, 30:].min()) < 100
    assert margin.max() == 255


def test_labels_are_as_frequent_as_the_classes() -> None:
    counts = [5, 0, 2, 1]
    # By the definition: one image of each class that has any left, the most frequent first.
    rounds = [0, 2, 3, 0, 2, 0, 0, 0]
    expected = [rounds[seed_for("label", seed) % 8] for seed in range(4000)]
    labels = seeded_labels_by_count(list(range(4000)), counts)
    assert labels.tolist() == expected
    shares = torch.bincount(labels, minlength=4) / len(labels)
    # Six standard deviations of the most frequent one.
    torch.testing.assert_close(shares, torch.tensor(counts) / 8, rtol=0, atol=0.05)
    assert not (labels == 1).any()


@pytest.mark.parametrize("num_images", [1, 3, 5000])
def test_labels_of_equally_frequent_classes_are_the_uniform_ones(num_images: int) -> None:
    seeds = list(range(2000))
    labels = seeded_labels_by_count(seeds, [num_images] * 10)
    assert torch.equal(labels, seeded_labels(seeds, 10))


def test_frequencies_of_classes_stay_with_a_generator(tmp_path: Path) -> None:
    spec = SnganModel(z_dim=8, base_channels=8, num_classes=3, resolution=16).model_dump()
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    save_snapshot(first, build_generator(spec), spec=spec, nimg=1, class_counts=[5, 0, 2])
    save_generator(again, load_generator(first), about={})
    assert load_generator(again).class_counts == (5, 0, 2)
    save_snapshot(again, build_generator(spec), spec=spec, nimg=1)
    assert load_generator(again).class_counts == ()
