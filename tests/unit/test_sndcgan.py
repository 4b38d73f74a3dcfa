"""SNGAN's plain networks: counts, norms and whole forwards against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.models.sndcgan import SndcganDiscriminator, SndcganGenerator


def generator(resolution: int = 32, width: int = 8, num_classes: int = 0) -> Any:
    torch.manual_seed(0)
    return SndcganGenerator(
        resolution=resolution,
        img_channels=3,
        z_dim=16,
        base_channels=width,
        num_classes=num_classes,
    )


def discriminator(resolution: int = 32, width: int = 8, num_classes: int = 0) -> Any:
    torch.manual_seed(0)
    return SndcganDiscriminator(
        resolution=resolution, img_channels=3, base_channels=width, num_classes=num_classes
    )


# Widths from the 4x4 map to the image.
WIDTHS = {16: [32, 16, 8], 32: [64, 32, 16, 8], 64: [64, 64, 32, 16, 8]}


@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize("resolution", WIDTHS)
def test_parameters_are_those_of_the_published_table(resolution: int, num_classes: int) -> None:
    widths = WIDTHS[resolution]
    expected = (16 + 1) * widths[0] * 16 + sum(2 * w * max(1, num_classes) for w in widths)
    expected += sum(a * b * 16 for a, b in zip(widths, widths[1:], strict=False))
    expected += 8 * 3 * 9 + 3
    found = sum(p.numel() for p in generator(resolution, 8, num_classes).parameters())
    assert found == expected
    expected, before = 0, 3
    for width in widths[:0:-1]:
        expected += before * width * 9 + width + width * width * 16 + width
        before = width
    expected += before * widths[0] * 9 + widths[0] + widths[0] + 1 + num_classes * widths[0]
    found = sum(p.numel() for p in discriminator(resolution, 8, num_classes).parameters())
    assert found == expected


def test_the_published_width_has_the_published_size() -> None:
    """64, 128, 256, 512 channels at 32x32 (table 3)."""
    shapes = [tuple(p.shape) for p in discriminator(width=64).parameters() if p.ndim == 4]
    assert shapes == [
        (64, 3, 3, 3), (64, 64, 4, 4), (128, 64, 3, 3), (128, 128, 4, 4),
        (256, 128, 3, 3), (256, 256, 4, 4), (512, 256, 3, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("num_classes", [0, 4])
def test_the_discriminator_is_normalised_convolutions_summed_over_the_map(num_classes: int) -> None:
    model = discriminator(16, 4, num_classes).double()
    for _ in range(200):  # power iterations, until the singular values are exact
        for part in model.modules():
            if hasattr(part, "parametrizations"):
                assert isinstance(part.weight, Tensor)
    model.eval()
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 2, 2]) % max(1, num_classes)

    def normalised(part: nn.Module) -> Tensor:
        weight: Tensor = part.parametrizations.weight.original  # type: ignore[union-attr, assignment]
        normalised_weight: Tensor = weight / torch.linalg.matrix_norm(weight.flatten(1), 2)
        return normalised_weight

    x = images
    convolutions = [part for part in model.layers if isinstance(part, nn.Conv2d)]
    for number, part in enumerate(convolutions):
        x = F.conv2d(x, normalised(part), part.bias, stride=1 + number % 2, padding=1)
        x = F.leaky_relu(x, 0.1)
    assert x.shape == (5, 16, 4, 4)
    features = x.sum((2, 3))
    expected = F.linear(features, normalised(model.head.linear), model.head.linear.bias)[:, 0]
    if num_classes:
        expected += (normalised(model.head.embedding)[labels] * features).sum(1)
    found = model(images, labels if num_classes else None)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_the_generator_is_the_table_with_class_conditional_norms() -> None:
    model = generator(16, 4, 3).double()
    for norm in model.norms:
        nn.init.normal_(norm.norm.gain.weight)
        nn.init.normal_(norm.norm.bias.weight)
    z, labels = torch.randn(6, 16).double(), torch.tensor([0, 1, 2, 0, 1, 2])

    def conditional(x: Tensor, norm: Any) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        gain, bias = (part.weight[labels][:, :, None, None] for part in (norm.gain, norm.bias))
        shown: Tensor = ((x - mean) / (var + 1e-5).sqrt() * (1 + gain) + bias).relu()
        return shown

    x = F.linear(z, model.linear.weight, model.linear.bias).view(6, 16, 4, 4)
    x = conditional(x, model.norms[0].norm)
    for up, norm in zip(model.ups, model.norms[1:], strict=True):
        x = conditional(F.conv_transpose2d(x, up.weight, stride=2, padding=1), norm.norm)
    expected = F.conv2d(x, model.last[0].weight, model.last[0].bias, padding=1).tanh()
    torch.testing.assert_close(model.train()(z, labels), expected)
