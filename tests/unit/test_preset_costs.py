"""The costs of presets against counts by hand, and the recipe of the presets for photographs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.preset_costs import Operations, Step, costs
from ganscale.config import load_config
from ganscale.models.convolution import conv2d, conv_transpose2d


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (4, False), (1, True), (4, True)])
def test_convolutions_and_their_gradients_are_counted_by_their_loops(
    groups: int, transposed: bool
) -> None:
    """3 images, 8 to 12 channels, 5x5 at stride 2 with padding 2; 10x10 and 5x5 places.

    Forward and both gradients each multiply as often, by the loops: images, places of the smaller
    map, channels of one side, channels of the other in the group, 25 elements of the kernel.
    """
    if transposed:
        x, weight = torch.zeros(3, 12, 5, 5), torch.zeros(12, 8 // groups, 5, 5)
    else:
        x, weight = torch.zeros(3, 8, 10, 10), torch.zeros(12, 8 // groups, 5, 5)
    x.requires_grad_()
    weight.requires_grad_()
    counter = Operations()
    with counter:
        if transposed:
            y = conv_transpose2d(x, weight, stride=2, padding=2, groups=groups)
        else:
            y = conv2d(x, weight, stride=2, padding=2, groups=groups)
        y.sum().backward()
    assert counter.flop == 3 * 2 * 3 * 25 * 12 * (8 // groups) * 25


def test_the_step_of_a_dcgan_has_the_operations_that_its_layers_say() -> None:
    """32x32, z 100, widths 64, 128, 256 from the image inwards; kernels 4x4.

    Multiplications of a forward: the generator's from the latent on, the discriminator's from
    the image on. In the discriminator's update the generator's forward has no gradients, and the
    first layer of the discriminator none by the image. In the generator's update the first layer of
    the generator has none by the latent, and the discriminator none by its weights.
    """
    config = load_config("dcgan-cifar10", ["training.batch_size=2"])
    first_g = 100 * 256 * 16
    generator = first_g + 16 * 16 * 256 * 128 + 64 * 16 * 128 * 64 + 256 * 16 * 64 * 3
    first_d = 256 * 16 * 3 * 64
    discriminator = first_d + 64 * 16 * 64 * 128 + 16 * 16 * 128 * 256 + 16 * 256
    update_d = generator + 2 * (3 * discriminator - first_d)
    update_g = 3 * generator - first_g + 2 * discriminator
    found = costs(config)
    assert found.flop_per_image == 2 * (update_d + update_g)
    generator_size, discriminator_size = found.parameters["G"], found.parameters["D"]
    state = 4 * (generator_size + discriminator_size) + generator_size
    assert found.state_bytes == 4 * state


def test_what_is_saved_is_counted_once_and_without_parameters() -> None:
    """Of y = (a b) c the product saves a, b and a b, c: c is a parameter, a b a new tensor."""
    step = Step(load_config("dcgan-cifar10"))
    a, b = torch.ones(100, requires_grad=True), torch.ones(100)
    c = next(step.generator.parameters())
    with step.counted(trained=step.generator):
        product = a * b
        ((product * c.flatten()[:100]) + product.square()).sum().backward()
    # a needs b (and a, if b needed a gradient), square and the product with c need a b.
    assert step.saved[-1] == 2 * 400


@pytest.mark.parametrize("resolution", [64, 128, 256])
def test_photographs_have_the_published_weight_of_r1(resolution: int) -> None:
    config = load_config(f"photos-{resolution}")
    assert config.model.resolution == resolution
    expected = 0.0002 * resolution**2 / config.training.batch_size
    assert config.penalty.r1.at(0) == pytest.approx(expected)
    kimg = config.training.batch_size * 10 / 32
    assert config.training.ema_halflife_kimg.at(10**7) == pytest.approx(1000 * kimg / 1000)
    # And before that a twentieth of the position.
    assert config.training.ema_halflife_kimg.at(50_000) == pytest.approx(2.5)
