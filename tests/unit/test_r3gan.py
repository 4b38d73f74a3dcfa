"""R3GAN against the published figures and its own formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.flop_counter import FlopCounterMode

from ganscale.config.models import R3ganModel
from ganscale.models import build_discriminator, build_generator
from ganscale.models.layers import binomial_filter, upsample
from ganscale.models.r3gan import R3ganGenerator

SMALL = R3ganModel(base_channels=16, blocks_per_stage=1, z_dim=8, num_classes=10).model_dump()


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small_generator() -> R3ganGenerator:
    torch.manual_seed(0)
    model = build_generator(SMALL)
    assert isinstance(model, R3ganGenerator)
    return model


def test_parameters_and_flops_are_the_published_ones() -> None:
    spec = R3ganModel(num_classes=10).model_dump()
    generator, discriminator = build_generator(spec), build_discriminator(spec)
    # 8 blocks of 2,583,552 and, in G, basis, two linear maps and the image; in D, the image, basis,
    # linear map and embedding: 20.78 M and 21.28 M.
    assert num_parameters(generator) == 20_781_952
    assert num_parameters(discriminator) == 21_280_512
    label = torch.zeros(1, dtype=torch.int64)
    given = ((generator, torch.zeros(1, 64)), (discriminator, torch.zeros(1, 3, 32, 32)))
    for player, inputs in given:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            player(inputs, label)
        assert counter.get_total_flops() == pytest.approx(14.05e9, rel=1e-3)


def test_a_fresh_generator_is_its_resampling_and_two_linear_maps() -> None:
    model = small_generator()
    z, labels = torch.randn(3, 8), torch.tensor([0, 4, 9])
    assert model.embedding is not None
    condition = torch.cat([z, one_hot(labels, 10).float() @ model.embedding.weight.T], dim=1)
    x = (condition @ model.linear.weight.T)[:, :, None, None] * model.basis
    for _ in range(3):
        x = upsample(x, binomial_filter(3))
    (to_image,) = model.to_image
    torch.testing.assert_close(model(z, labels), to_image(x))


def test_initial_weights_have_the_deviations_of_he_and_fixup() -> None:
    torch.manual_seed(0)
    spec = {**SMALL, "base_channels": 192, "blocks_per_stage": 2}
    for model in (build_generator(spec), build_discriminator(spec)):
        blocks = [m for m in model.modules() if type(m).__name__ == "_Block"]
        assert len(blocks) == 8
        gain = math.sqrt(2 / 1.04) * 8**-0.25
        for block in blocks:
            expand, mix, contract = block.expand, block.mix, block.contract
            assert isinstance(mix, nn.Conv2d)
            assert mix.groups == 24  # of 16 channels
            assert expand.weight.std().item() == pytest.approx(gain / 192**0.5, rel=0.02)  # type: ignore[union-attr, operator]
            assert mix.weight.std().item() == pytest.approx(gain / (16 * 9) ** 0.5, rel=0.02)
            assert not contract.weight.any()  # type: ignore[union-attr, operator]


def test_the_variance_of_fresh_logits_is_that_of_their_linear_maps() -> None:
    """The head's maps have unit gain, its embedding's 1 / (10 * width), and the basis's 1 / 16."""
    found = []
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for seed in range(12):
        torch.manual_seed(seed)
        model = build_discriminator({**SMALL, "base_channels": 64})
        with torch.no_grad():
            features = model.last(model.stages(model.from_image(images)))  # type: ignore[operator]
            logits = model(images, torch.arange(64) % 10)
        expected = features.square().mean() / 10
        found.append(float(logits.square().mean() / expected))
    assert sum(found) / 12 == pytest.approx(1.0, abs=0.35)


@pytest.mark.parametrize(("resolution", "channels"), [(16, 1), (32, 3), (64, 4)])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_shapes_and_what_labels_do(resolution: int, channels: int, num_classes: int) -> None:
    spec = {**SMALL, "resolution": resolution, "img_channels": channels}
    spec["num_classes"] = num_classes
    torch.manual_seed(0)
    generator, discriminator = build_generator(spec), build_discriminator(spec)
    z, (ones, twos) = torch.randn(2, 8), (torch.tensor([1, 1]), torch.tensor([2, 2]))
    images = generator(z, ones)
    assert images.shape == (2, channels, resolution, resolution)
    logits = discriminator(images, ones)
    assert logits.shape == (2,)
    same = torch.equal(images, generator(z, twos)), torch.equal(logits, discriminator(images, twos))
    assert same == (num_classes == 0, num_classes == 0)


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = small_generator()
    z, labels = torch.randn(9, 8), torch.arange(9)
    torch.testing.assert_close(model(z[4:5], labels[4:5])[0], model(z, labels)[4])


def test_the_smallest_maps_image_and_logit_are_fp32_under_bf16() -> None:
    torch.manual_seed(0)
    generator, discriminator = small_generator(), build_discriminator(SMALL)
    seen: dict[str, torch.dtype] = {}
    parts: dict[str, Any] = {"first": generator.first[0], "image": generator.to_image[0]}
    parts |= {"middle": generator.stages[1], "last": discriminator.last[0]}  # type: ignore[index]
    for name, part in parts.items():
        part.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = discriminator(generator(torch.randn(2, 8), torch.arange(2)), torch.arange(2))
    assert logits.dtype == torch.float32
    assert seen == dict.fromkeys(parts, torch.float32) | {"middle": torch.bfloat16}
