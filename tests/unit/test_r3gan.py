"""R3GAN against the published figures and its own formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate, leaky_relu, one_hot, pad
from torch.utils.flop_counter import FlopCounterMode

from ganscale.config.models import R3ganModel
from ganscale.models import build_discriminator, build_generator
from ganscale.models.r3gan import R3ganDiscriminator, R3ganGenerator

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
        x = doubled(x)
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


def test_every_other_initial_weight_has_unit_gain() -> None:
    torch.manual_seed(0)
    spec = {**SMALL, "base_channels": 256, "resolution": 64}
    generator: Any = build_generator(spec)
    discriminator: Any = build_discriminator(spec)
    width = 256
    deviations = {
        generator.basis: 1.0,
        generator.embedding.weight: 10**-0.5,
        generator.linear.weight: (8 + 64) ** -0.5,
        generator.to_image[0].weight: (width // 2) ** -0.5,
        discriminator.from_image.weight: 3**-0.5,
        discriminator.last[1].weight: 1 / 4,
        discriminator.head.linear.weight: width**-0.5,
        discriminator.head.embedding.weight: (10 * width) ** -0.5,
    }
    for player in (generator, discriminator):
        (narrowing,) = [
            m.conv for m in player.stages if hasattr(getattr(m, "conv", None), "weight")
        ]
        deviations[narrowing.weight] = narrowing.in_channels**-0.5
    for weight, deviation in deviations.items():
        spread = 5 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(deviation, rel=spread), tuple(weight.shape)


def block_by_hand(x: Tensor, block: Any) -> Tensor:
    """The 3x3 convolution as one for each group of 16 channels."""
    h = leaky_relu(conv2d(x, block.expand.weight, block.expand.bias), 0.2)
    parts = zip(
        h.split(16, dim=1), block.mix.weight.split(16), block.mix.bias.split(16), strict=True
    )
    h = torch.cat([conv2d(part, weight, bias, padding=1) for part, weight, bias in parts], dim=1)
    return x + conv2d(leaky_relu(h, 0.2), block.contract.weight)


def doubled(x: Tensor) -> Tensor:
    """Bilinear interpolation to twice the side, of an image with zeros beyond."""
    return interpolate(pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear")[..., 2:-2, 2:-2]


def halved(x: Tensor) -> Tensor:
    """By [1, 2, 1] / 4 along both sides, zeros beyond; then the means of 2x2 pixels."""
    x = pad(x, (1, 1, 1, 1))
    x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
    return avg_pool2d((x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4, 2)


def resampled(x: Tensor, layer: Any) -> Tensor:
    """A 1x1 convolution, where there is one, and twice or half the side."""
    if hasattr(layer.conv, "weight"):
        x = conv2d(x, layer.conv.weight)
    return doubled(x) if layer.up else halved(x)


def stages_by_hand(x: Tensor, stages: Any) -> Tensor:
    for layer in stages:
        x = block_by_hand(x, layer) if hasattr(layer, "contract") else resampled(x, layer)
    return x


def perturbed(model: nn.Module) -> Any:
    """In float64, with nothing left at zero."""
    for parameter in model.double().parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("resolution", [16, 64])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_both_players_are_their_layers_by_hand(resolution: int, num_classes: int) -> None:
    torch.manual_seed(0)
    spec = {**SMALL, "resolution": resolution, "num_classes": num_classes, "base_channels": 32}
    generator, discriminator = (
        perturbed(build_generator(spec)),
        perturbed(build_discriminator(spec)),
    )
    z, labels = torch.randn(2, 8).double(), torch.tensor([3, 8])
    condition = z
    if num_classes:
        condition = torch.cat([z, generator.embedding.weight.T[labels]], dim=1)
    x = (condition @ generator.linear.weight.T)[:, :, None, None] * generator.basis
    x = stages_by_hand(stages_by_hand(x, generator.first), generator.stages)
    images = conv2d(x, generator.to_image[0].weight)
    torch.testing.assert_close(generator(z, labels), images)

    x = stages_by_hand(conv2d(images, discriminator.from_image.weight), discriminator.stages)
    *blocks, basis = discriminator.last
    x = stages_by_hand(x, blocks)
    assert x.shape == (2, 32, 4, 4)
    features = (x * basis.weight[:, 0]).sum(dim=(2, 3))
    logits = features @ discriminator.head.linear.weight.T
    if num_classes:
        logits = logits * discriminator.head.embedding.weight.T[labels]
    torch.testing.assert_close(discriminator(images, labels), logits.sum(dim=1))


@pytest.mark.parametrize("num_classes", [0, 10])
def test_the_variance_of_fresh_logits_is_the_mean_square_of_the_smallest_image(
    num_classes: int,
) -> None:
    """Blocks are identities and all other gains 1; the embedding divides by num_classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 8, 8, generator=generator)
    expected = halved(images).square().mean() / max(1, num_classes)
    squares = []
    for seed in range(150):
        torch.manual_seed(seed)
        model = R3ganDiscriminator(
            resolution=8,
            img_channels=3,
            base_channels=64,
            num_classes=num_classes,
            blocks_per_stage=1,
        )
        with torch.no_grad():
            squares.append(model(images, torch.arange(32) % 10).square().mean())
    ratios = torch.stack(squares) / expected
    # One network's ratio has a deviation of about 1/3: five of those of the mean's.
    assert ratios.std() < 0.5
    assert ratios.mean().item() == pytest.approx(1.0, abs=5 * 0.4 / 150**0.5)


def test_a_logit_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    model = perturbed(build_discriminator(SMALL))
    images, labels = torch.randn(4, 3, 32, 32).double(), torch.tensor([1, 5, 5, 9])
    together = model(images, labels)
    assert together.std() > 0
    torch.testing.assert_close(model(images[2:3], labels[2:3]), together[2:3])


@pytest.mark.parametrize("num_classes", [0, 10])
def test_fp32_parts_also_compute_in_fp32_under_bf16(num_classes: int) -> None:
    """Each layer's own output, so that a cast at the end of a half-precision part is no excuse."""
    torch.manual_seed(0)
    spec = {**SMALL, "num_classes": num_classes}
    generator: Any = build_generator(spec)
    discriminator: Any = build_discriminator(spec)
    wide = [generator.linear, generator.first, generator.to_image]
    wide += [discriminator.last, discriminator.head]
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    in_wide = {m for part in wide for m in part.modules()}
    for module in [*generator.modules(), *discriminator.modules()]:
        if isinstance(module, nn.Conv2d | nn.Linear) and module is not generator.embedding:
            is_wide = module in in_wide
            module.register_forward_hook(
                lambda _, __, out, is_wide=is_wide: seen[is_wide].add(out.dtype)
            )
    with torch.autocast("cpu", torch.bfloat16):
        discriminator(generator(torch.randn(2, 8), torch.arange(2)), torch.arange(2))
    assert seen == {True: {torch.float32}, False: {torch.bfloat16}}
