"""Sets of transforms: independent samples, frequencies, two derivatives, precision, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ganscale.augment.draws import Draws
from ganscale.augment.pipeline import AUGMENTATIONS, TRANSFORMS, Augmentation


def random_images(n: int, resolution: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(n, channels, resolution, resolution, generator=generator) * 2 - 1


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MOVES = ["xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac"]
COLOURS = ["brightness", "contrast", "lumaflip", "hue", "saturation"]


def test_named_sets_are_those_of_their_papers() -> None:
    assert {
        "diffaugment": {"colour": 1, "translation": 1, "cutout": 1},
        "ada": dict.fromkeys(MOVES + COLOURS, 1),
        "r3gan": {**dict.fromkeys([*MOVES, "cutout"], 1), **dict.fromkeys(COLOURS, 0.5)},
        "flip_translate": {"xflip": 1, "xint": 1},
    } == AUGMENTATIONS


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_nothing_happens_at_p_0(name: str, channels: int) -> None:
    augment = Augmentation(AUGMENTATIONS[name])
    images = random_images(6, 16, channels)
    draws = augment.draw(6, seeded(0))
    assert torch.equal(augment(images, draws, 0.0), images)
    assert torch.equal(augment(images, draws, torch.tensor(0.0)), images)
    changed = (augment(images, draws, 1.0) != images).flatten(1).any(1)
    assert changed.sum() >= 4


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_sample_depends_on_its_image_and_its_draws_alone(name: str) -> None:
    augment = Augmentation(AUGMENTATIONS[name])
    images, draws = random_images(8, 16), augment.draw(8, seeded(1))
    together = augment(images, draws, 0.7)
    alone = [augment(images[[i]], draws[torch.tensor([i])], 0.7) for i in range(8)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=2e-6)

    slots = torch.tensor([1, 3, 5, 7])
    torch.testing.assert_close(augment(images[slots], draws[slots], 0.7), together[slots])

    others = images.clone()
    others[1:] = -others[1:].flip(0)
    other_draws = Draws(draws.uniform.clone(), draws.normal.clone())
    other_draws.uniform[1:] = draws.uniform[1:].flip(0)
    changed = augment(others, other_draws, 0.7)
    assert torch.equal(changed[0], together[0])
    assert not torch.equal(changed[1:], together[1:])


def test_columns_follow_from_the_set_alone() -> None:
    forwards = Augmentation(AUGMENTATIONS["ada"])
    backwards = Augmentation(dict(reversed(AUGMENTATIONS["ada"].items())))
    halved = Augmentation(dict.fromkeys(AUGMENTATIONS["ada"], 0.5))
    images, draws = random_images(4, 16), forwards.draw(4, seeded(2))
    for augment in (backwards, halved):
        again = augment.draw(4, seeded(2))
        assert torch.equal(again.uniform, draws.uniform)
        assert torch.equal(again.normal, draws.normal)
    assert torch.equal(backwards(images, draws, 0.8), forwards(images, draws, 0.8))
    assert torch.equal(halved(images, draws, 1.0), forwards(images, draws, 0.5))


def test_draws_are_uniform_and_normal_numbers_in_rows_of_their_own() -> None:
    draws = Augmentation(dict.fromkeys(TRANSFORMS, 1.0)).draw(5000, seeded(3))
    assert draws.uniform.shape == (5000, 31)
    assert draws.normal.shape == (5000, 7)
    assert draws.uniform.min() >= 0
    assert draws.uniform.max() < 1
    torch.testing.assert_close(draws.uniform.mean(0), torch.full((31,), 0.5), rtol=0, atol=0.025)
    torch.testing.assert_close(draws.normal.std(0), torch.ones(7), rtol=0, atol=0.06)
    assert len(draws.uniform.unique(dim=0)) == 5000


SHARES = {
    "xflip": 1 / 2,
    "rotate90": 3 / 4,
    "xint": 3 / 4,  # at 8 pixels a shift is -1, 0, 0 or 1 on each axis, before and after rounding
    "lumaflip": 1 / 2,
    "translation": 8 / 9,  # -1, 0, 1
}
"""How many of the samples that execute a transform it changes, where that is not all."""


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_changes_its_share_of_the_samples(name: str) -> None:
    n, weight, p = 2000, 0.75, 0.6
    augment = Augmentation({name: weight})
    images = random_images(1, 8).expand(n, -1, -1, -1)
    result = augment(images, augment.draw(n, seeded(4)), torch.tensor(p))
    changed = (result != images).flatten(1).any(1).sum().item()
    expected = p * weight * SHARES.get(name, 1.0)
    bound = 4 * math.sqrt(n * expected * (1 - expected))
    assert abs(changed - n * expected) < bound


def test_each_rotation_is_executed_so_that_p_of_the_samples_turn() -> None:
    """At p = 3/4 each has the chance 1 - sqrt(1 - p) = 1/2, and (1/2) ** 2 = 1 - p for neither."""
    gates = torch.tensor([[0.49, 0.51], [0.51, 0.49], [0.49, 0.49], [0.51, 0.51]])
    uniform = torch.full((4, 4), 0.6)
    uniform[:, 0], uniform[:, 2] = gates.T
    images = random_images(4, 8)
    turned = Augmentation({"rotate": 1.0})(images, Draws(uniform, torch.empty(4, 0)), 0.75)
    assert (turned != images).flatten(1).any(1).tolist() == [True, True, True, False]


def bent(augment: Augmentation, draws: Draws, images: Tensor) -> Tensor:
    """Follow the augmentation by something with a second derivative, as a discriminator has."""
    return torch.tanh(augment(images, draws, 1.0))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_both_derivatives_are_those_of_finite_differences(name: str) -> None:
    augment = Augmentation(AUGMENTATIONS[name])
    draws = augment.draw(2, seeded(6))
    images = random_images(2, 5).double().requires_grad_()
    assert bent(augment, draws, images).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: bent(augment, draws, x), images)
    assert torch.autograd.gradgradcheck(lambda x: bent(augment, draws, x), images, fast_mode=True)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_do_not_reach_the_arithmetic(
    name: str, dtype: torch.dtype
) -> None:
    augment = Augmentation(AUGMENTATIONS[name])
    images, draws = random_images(8, 16), augment.draw(8, seeded(8))
    rounded = images.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = augment(rounded, draws, 1.0)
    assert result.dtype == torch.float32
    assert torch.equal(result, augment(rounded.float(), draws, 1.0))
    tolerance = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(result, augment(images, draws, 1.0), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_no_value_is_read_back_on_the_host(name: str) -> None:
    augment = Augmentation(AUGMENTATIONS[name])
    draws = augment.draw(2, seeded(9))
    augment(random_images(2, 16), draws, 0.5)  # makes the filters, once
    with FakeTensorMode(allow_non_fake_inputs=True):  # its tensors have no values to read
        images, p = torch.empty(2, 3, 16, 16), torch.empty(())
        with pytest.raises(RuntimeError, match="scalar"):
            p.item()
        fake_draws = Draws(torch.empty(draws.uniform.shape), torch.empty(draws.normal.shape))
        result = augment(images, fake_draws, p)
    assert result.shape == images.shape


def test_filters_made_without_gradients_serve_training_later() -> None:
    augment = Augmentation({"scale": 1.0})
    images, draws = random_images(1, 13), augment.draw(1, seeded(10))
    with torch.inference_mode():
        expected = augment(images, draws, 1.0)
    images.requires_grad_()
    result = augment(images, draws, 1.0)
    result.square().sum().backward()
    assert images.grad is not None
    assert torch.equal(result, expected)


def test_an_unknown_transform_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"transforms twirl; choose from xflip, .*, cutout"):
        Augmentation({"xflip": 1.0, "twirl": 1.0})


@pytest.mark.parametrize("weight", [-0.1, 1.5])
def test_a_weight_outside_0_to_1_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight of hue must be within \[0, 1\], got"):
        Augmentation({"hue": weight})


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_a_probability_outside_0_to_1_is_refused(p: float) -> None:
    augment = Augmentation({"xflip": 1.0})
    with pytest.raises(ValueError, match=r"p must be within \[0, 1\], got"):
        augment(random_images(1, 8), augment.draw(1, seeded(0)), p)
