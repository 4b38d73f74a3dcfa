"""SNGAN's counts, norms, initial weights and whole forwards against arithmetic by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ganscale.models.sngan import SnganDiscriminator, SnganGenerator


def generator(resolution: int = 32, width: int = 8, num_classes: int = 0) -> Any:
    return SnganGenerator(
        resolution=resolution,
        img_channels=3,
        z_dim=16,
        base_channels=width,
        num_classes=num_classes,
    )


def discriminator(resolution: int = 32, width: int = 8, num_classes: int = 0) -> Any:
    return SnganDiscriminator(
        resolution=resolution, img_channels=3, base_channels=width, num_classes=num_classes
    )


def warmed_up(model: Any, num_forwards: int) -> Any:
    """After so many steps of every weight's power iteration."""
    for _ in range(num_forwards):
        for module in model.modules():
            if hasattr(module, "parametrizations"):
                assert isinstance(module.weight, Tensor)
    return model


def conv(fan_in: int, fan_out: int, side: int) -> int:
    return fan_in * fan_out * side * side + fan_out


def generator_count(widths: list[int], z_dim: int, num_classes: int) -> int:
    """Widths of the maps of 4, 8, ... pixels a side."""
    total = z_dim * widths[0] * 16 + widths[0] * 16
    for before, after in zip(widths, widths[1:], strict=False):
        total += conv(before, after, 3) + conv(after, after, 3) + conv(before, after, 1)
        total += 2 * (before + after) * max(1, num_classes)
    return total + 2 * widths[-1] + conv(widths[-1], 3, 3)


def discriminator_count(widths: list[int], num_classes: int) -> int:
    """Widths at resolution, resolution / 2, ..., 16 and of the two blocks at 8."""
    total, before = 0, 3
    for width, halved in zip(widths, [True] * (len(widths) - 2) + [False] * 2, strict=True):
        total += conv(before, width, 3) + conv(width, width, 3)
        total += conv(before, width, 1) if halved or before != width else 0
        before = width
    return total + before + 1 + num_classes * before


WIDTHS = {
    16: ([16, 16, 16], [8, 8, 8]),
    32: ([16, 16, 16, 16], [8, 8, 8, 8]),
    64: ([16, 16, 16, 16, 8], [4, 8, 8, 8, 8]),
    128: ([16, 16, 16, 16, 8, 4], [2, 4, 8, 8, 8, 8]),
}


@pytest.mark.parametrize("resolution", WIDTHS)
@pytest.mark.parametrize("num_classes", [0, 10])
def test_parameters_are_those_of_the_widths(resolution: int, num_classes: int) -> None:
    up, down = WIDTHS[resolution]
    found = [
        sum(p.numel() for p in player(resolution, 8, num_classes).parameters())
        for player in (generator, discriminator)
    ]
    assert found == [generator_count(up, 16, num_classes), discriminator_count(down, num_classes)]


def test_the_published_configuration_has_its_count() -> None:
    with torch.device("meta"):
        model = SnganGenerator(
            resolution=32, img_channels=3, z_dim=128, base_channels=128, num_classes=0
        )
    assert sum(p.numel() for p in model.parameters()) == 4_276_739
    assert generator_count([256] * 4, 128, 0) == 4_276_739


@pytest.mark.parametrize("resolution", [16, 64])
def test_no_weight_of_the_discriminator_has_a_singular_value_above_1(resolution: int) -> None:
    torch.manual_seed(0)
    model = warmed_up(discriminator(resolution, 8, 10), 300).eval()
    weights = {
        name: module.weight.detach().flatten(1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding)
    }
    matrices = [p for p in model.parameters() if p.ndim > 1]
    assert len(weights) == len(matrices) >= 9
    for name, weight in weights.items():
        largest = torch.linalg.svdvals(weight)[0].item()
        assert largest == pytest.approx(1.0, abs=2e-3), name


def standardised(x: Tensor) -> Tensor:
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean(dim=(0, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def halved(x: Tensor) -> Tensor:
    corners = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return (corners[0] + corners[1] + corners[2] + corners[3]) / 4


def by_hand(x: Tensor, layer: Any) -> Tensor:
    """A convolution whose output has the side of its input."""
    return conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


def normed_by_hand(x: Tensor, state: dict[str, Tensor], prefix: str, labels: Tensor) -> Tensor:
    """Batch norm with each class's gain, 1 more than what is learnt, or with one for all."""
    if f"{prefix}.gain.weight" in state:
        gain = 1 + state[f"{prefix}.gain.weight"][labels][:, :, None, None]
        bias = state[f"{prefix}.bias.weight"][labels][:, :, None, None]
    else:
        gain = state[f"{prefix}.weight"][:, None, None]
        bias = state[f"{prefix}.bias"][:, None, None]
    return standardised(x) * gain + bias


def perturbed(model: Any) -> Any:
    """With nothing left at zero or one."""
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("num_classes", [0, 3])
def test_an_image_is_table_4_by_hand(num_classes: int) -> None:
    torch.manual_seed(0)
    model = perturbed(generator(16, 4, num_classes)).double()
    z, labels, state = (
        torch.randn(5, 16).double(),
        torch.tensor([0, 2, 1, 2, 2]),
        model.state_dict(),
    )
    x = (z @ model.linear.weight.T + model.linear.bias).view(5, 8, 4, 4)
    for number, block in enumerate(model.blocks):
        prefix = f"blocks.{number}."
        h = doubled(normed_by_hand(x, state, prefix + "norm1.norm", labels).relu())
        h = normed_by_hand(by_hand(h, block.conv1), state, prefix + "norm2.norm", labels).relu()
        x = by_hand(h, block.conv2) + by_hand(doubled(x), block.shortcut)
    x = normed_by_hand(x, state, "last.0", labels).relu()
    expected = torch.tanh(by_hand(x, model.last[2]))
    assert expected.shape == (5, 3, 16, 16)
    torch.testing.assert_close(model(z, labels), expected)


@pytest.mark.parametrize("resolution", [16, 32, 64])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_logit_is_table_4_by_hand(resolution: int, num_classes: int) -> None:
    torch.manual_seed(0)
    model = perturbed(discriminator(resolution, 4, num_classes)).eval()
    images, labels = torch.randn(3, 3, resolution, resolution), torch.tensor([0, 2, 1])
    x, num_halvings = images, int(math.log2(resolution)) - 3
    for number, block in enumerate(model.blocks):
        h = by_hand(x.relu() if number else x, block.conv1).relu()
        h = by_hand(h, block.conv2)
        if number < num_halvings:
            x = halved(h) + by_hand(halved(x), block.shortcut)
        else:
            x = h + (by_hand(x, block.shortcut) if hasattr(block.shortcut, "weight") else x)
    assert x.shape == (3, 4, 8, 8)
    features = x.relu().flatten(2).sum(dim=2)
    expected = features @ model.head.linear.weight[0] + model.head.linear.bias
    if num_classes:
        expected = expected + (features * model.head.embedding.weight[labels]).sum(dim=1)
    torch.testing.assert_close(model(images, labels), expected, rtol=1e-4, atol=1e-4)


def test_the_discriminator_also_computes_in_double_precision() -> None:
    torch.manual_seed(0)
    model, images = discriminator(16, 4, 3).eval(), torch.randn(2, 3, 16, 16)
    labels = torch.tensor([0, 2])
    single = model(images, labels)
    double = model.double()(images.double(), labels)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)


def test_images_and_logits_do_not_depend_on_their_batch_in_evaluation() -> None:
    torch.manual_seed(0)
    players = [perturbed(player(16, 4, 3)).eval() for player in (generator, discriminator)]
    z, images, labels = torch.randn(4, 16), torch.randn(4, 3, 16, 16), torch.tensor([0, 2, 1, 0])
    for player, given in zip(players, (z, images), strict=True):
        together = player(given, labels)
        assert together.std() > 0
        alone = player(given[2:3], labels[2:3])
        torch.testing.assert_close(alone, together[2:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_classes", [0, 10])
def test_only_a_conditional_player_depends_on_labels(num_classes: int) -> None:
    torch.manual_seed(0)
    players = [
        perturbed(player(16, 4, num_classes)).eval() for player in (generator, discriminator)
    ]
    for player, given in zip(players, (torch.randn(2, 16), torch.randn(2, 3, 16, 16)), strict=True):
        ones, mixed = (player(given, torch.tensor(labels)) for labels in ([1, 1], [1, 7]))
        torch.testing.assert_close(ones[0], mixed[0])
        assert torch.equal(ones[1], mixed[1]) == (num_classes == 0)


def test_a_fresh_conditional_generator_treats_all_classes_alike() -> None:
    torch.manual_seed(0)
    model, z = generator(16, 4, 10), torch.randn(3, 16)
    one, other = model(z, torch.tensor([0, 1, 2])), model(z, torch.tensor([9, 9, 9]))
    assert torch.equal(one, other)
    assert one.abs().max() <= 1
    assert one.std() > 0


def test_initial_weights_are_uniform_with_xaviers_variance_doubled_inside_blocks() -> None:
    torch.manual_seed(0)
    players = {"generator": generator(32, 32), "discriminator": discriminator(32, 64)}
    weights = {
        f"{player}.{name}".replace("parametrizations.weight.original", "weight"): value
        for player, model in players.items()
        for name, value in model.named_parameters()
    }
    checked = 0
    for name, weight in weights.items():
        if name.endswith("weight") and weight.ndim > 1:
            fan_in, fan_out = weight[0].numel(), weight[:, 0].numel()
            gain = 2.0 if "conv1" in name or "conv2" in name else 1.0
            variance = 2 * gain / (fan_in + fan_out)
            bound = math.sqrt(3 * variance)
            assert bound * 0.9 < weight.abs().max().item() <= bound * (1 + 1e-6), name
            spread = 5 * math.sqrt(0.8 / weight.numel())  # of the square of a uniform number
            assert weight.square().mean().item() == pytest.approx(variance, rel=spread), name
            checked += 1
        elif name.endswith("bias") and "norm" not in name:
            assert not weight.any(), name
    assert checked == (1 + 3 * 3 + 1) + (2 * 3 + 2 * 2 + 1)
