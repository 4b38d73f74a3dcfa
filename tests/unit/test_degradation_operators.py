"""Operators against their definitions in numpy and scipy, their adjoints against dot products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.testing import assert_close

from ganscale.errors import ConfigError
from ganscale.generation.degradations import (
    TASKS,
    Degradation,
    build_degradation,
    build_mask,
    colourise,
    deblur,
    denoise,
    identity,
    inpaint,
    superres,
)

SIDE = 16
Array = NDArray[np.float64]


def half(images: Array) -> Array:
    return images[..., : SIDE // 2].reshape(*images.shape[:2], -1)


def blocks(scale: int) -> Callable[[Array], Array]:
    def means(images: Array) -> Array:
        n, c, h, w = images.shape
        tiles: Array = images.reshape(n, c, h // scale, scale, w // scale, scale)
        return np.asarray(tiles.mean((3, 5)))

    return means


def gaussian(images: Array) -> Array:
    # scipy's "mirror" is torch's "reflect"; its kernel is cut at truncate * sigma.
    blurred: Array = ndimage.gaussian_filter(images, (0, 0, 1.2, 1.2), mode="mirror", radius=4)
    return blurred


def brightness(images: Array) -> Array:
    return 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]


CASES: dict[str, tuple[Degradation, Callable[[Array], Array]]] = {
    "identity": (identity(), lambda images: images),
    "inpaint": (inpaint(build_mask("half", SIDE, SIDE)), half),
    "superres x2": (superres(2), blocks(2)),
    "superres x4": (superres(4), blocks(4)),
    "denoise": (denoise(0.1), lambda images: images),
    "deblur": (deblur(1.2), gaussian),
    "colourise": (colourise(), brightness),
}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_its_definition(name: str, images: Tensor) -> None:
    degradation, definition = CASES[name]
    wanted = torch.from_numpy(definition(images.numpy()))
    assert_close(degradation.operator(images).reshape(wanted.shape), wanted)


@pytest.mark.parametrize("name", CASES)
def test_what_autograd_applies_is_the_adjoint(name: str, images: Tensor) -> None:
    operator = CASES[name][0].operator
    images.requires_grad_(True)
    seen = operator(images)
    other = torch.randn(seen.shape, generator=torch.Generator().manual_seed(1), dtype=seen.dtype)
    (adjoint,) = torch.autograd.grad(seen, images, other)
    third = torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).double()
    assert_close((operator(third) * other).sum(), (third * adjoint).sum())


@pytest.mark.parametrize("name", CASES)
def test_the_trivial_reconstruction_is_an_image_of_the_same_size(name: str, images: Tensor) -> None:
    degradation = CASES[name][0]
    observed = degradation.observe(images, [0, 1, 2])
    for filled in (degradation.fill(observed), degradation.baseline(observed)):
        assert filled.shape == images.shape
        assert filled.isfinite().all()


def test_half_an_image_is_filled_with_the_mean_of_the_other(images: Tensor) -> None:
    degradation = CASES["inpaint"][0]
    filled = degradation.fill(degradation.operator(images))
    assert_close(filled[..., : SIDE // 2], images[..., : SIDE // 2])
    mean = images[..., : SIDE // 2].mean((2, 3))[:, :, None, None]
    assert_close(filled[..., SIDE // 2 :], mean.expand(-1, -1, SIDE, SIDE // 2))


def test_the_trivial_reconstruction_of_a_whole_image_is_its_mean_colour(images: Tensor) -> None:
    degradation = CASES["identity"][0]
    assert torch.equal(degradation.fill(images), images)
    mean = images.mean((2, 3), keepdim=True)
    assert_close(degradation.baseline(images), mean.expand_as(images))


def test_known_pixels_are_put_back(images: Tensor) -> None:
    degradation = CASES["inpaint"][0]
    completed = degradation.completed(torch.zeros_like(images), degradation.operator(images))
    assert_close(completed[..., : SIDE // 2], images[..., : SIDE // 2])
    assert not completed[..., SIDE // 2 :].any()


def test_noisy_pixels_are_not_taken_for_known() -> None:
    assert inpaint(build_mask("half", SIDE, SIDE), noise=0.1).known is None


def test_misfit_is_the_mean_square_over_what_is_seen(images: Tensor) -> None:
    degradation = CASES["inpaint"][0]
    moved = images.clone()
    moved[..., : SIDE // 2] += 0.5
    moved[..., SIDE // 2 :] += 7.0
    found = degradation.misfit(moved, degradation.operator(images))
    assert_close(found, torch.full((3,), 0.25).double())


def test_noise_has_its_size_and_belongs_to_the_image() -> None:
    black = torch.zeros(2, 3, 64, 64)
    degradation = denoise(0.2)
    both = degradation.observe(black, [7, 8])
    assert float(both.std()) == pytest.approx(0.2, rel=0.02)
    assert_close(degradation.observe(black[:1], [8]), both[1:])
    assert not torch.equal(degradation.observe(black, [7, 8], seed=1), both)


def test_masks_by_name() -> None:
    centre = build_mask("centre", 8, 8)
    assert centre.sum() == 16
    assert centre[2:6, 2:6].all()
    random = build_mask("random", 64, 64, seed=3)
    assert float(random.float().mean()) == pytest.approx(0.75, abs=0.02)
    assert torch.equal(random, build_mask("random", 64, 64, seed=3))


def test_a_mask_may_be_a_picture(tmp_path: Path) -> None:
    from torchvision.io import write_png

    wanted = torch.zeros(1, 8, 8, dtype=torch.uint8)
    wanted[0, :3] = 255
    path = tmp_path / "mask.png"
    write_png(wanted, str(path))
    assert torch.equal(build_mask(str(path), 8, 8), wanted[0] > 0)
    with pytest.raises(ConfigError, match=r"is 8x8, the images are 16x16"):
        build_mask(str(path), 16, 16)


@pytest.mark.parametrize(
    ("setting", "owner"),
    [({"mask": "half"}, "inpaint"), ({"scale": 4}, "superres"), ({"blur": 1.5}, "deblur")],
)
def test_settings_of_another_task_are_refused(setting: dict[str, Any], owner: str) -> None:
    assert build_degradation(owner, (3, SIDE, SIDE), **setting).name.startswith(owner)
    for task in set(TASKS) - {owner}:
        with pytest.raises(ConfigError, match=f"is for {owner}: leave it, or choose"):
            build_degradation(task, (3, SIDE, SIDE), **setting)


def test_what_makes_no_sense_is_refused(images: Tensor) -> None:
    with pytest.raises(ConfigError, match="expected half, centre, random or a picture"):
        build_mask("quarter", 8, 8)
    with pytest.raises(ConfigError, match="leave some pixels and remove some"):
        inpaint(torch.zeros(8, 8, dtype=torch.bool))
    with pytest.raises(ConfigError, match="needs noise"):
        denoise(0.0)
    with pytest.raises(ConfigError, match="needs a blur"):
        deblur(-1.0)
    with pytest.raises(ConfigError, match="too wide for 16 pixels"):
        deblur(8.0).operator(images)
    with pytest.raises(ConfigError, match="not images of 1 channels"):
        colourise().operator(images[:, :1])
