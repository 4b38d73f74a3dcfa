"""StyleGAN2 against per-sample loops, closed forms, finite differences and counts by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.models.layers import MinibatchStd, binomial_filter, downsample, upsample
from ganscale.models.stylegan2 import (
    EqualisedConv2d,
    EqualisedLinear,
    Stylegan2Discriminator,
    Stylegan2Generator,
    modulated_conv2d,
)

TAPS = binomial_filter().double()
WIDTH, Z_DIM = 8, 6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def generator(**changes: Any) -> Stylegan2Generator:
    options = {"resolution": 16, "img_channels": 3, "num_classes": 0, "mapping_layers": 2}
    return Stylegan2Generator(z_dim=Z_DIM, base_channels=WIDTH, **(options | changes))


def discriminator(**changes: Any) -> Stylegan2Discriminator:
    options = {"resolution": 16, "img_channels": 3, "num_classes": 0, "residual": False}
    return Stylegan2Discriminator(base_channels=WIDTH, **(options | changes))


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def per_sample_weights(weight: Tensor, style: Tensor, demodulate: bool) -> list[Tensor]:
    """Equations 1 and 3 written out for each sample and output channel."""
    weights = []
    for s in style:
        modulated = torch.stack([weight[:, i] * s[i] for i in range(len(s))], dim=1)
        if demodulate:
            modulated = torch.stack([w / math.sqrt(float((w**2).sum())) for w in modulated])
        weights.append(modulated)
    return weights


@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_modulated_convolution_gives_each_sample_its_own_weight(
    kernel_size: int, demodulate: bool
) -> None:
    x, style, weight = noise(3, 4, 5, 5), noise(3, 4), noise(6, 4, kernel_size, kernel_size)
    weights = per_sample_weights(weight, style, demodulate)
    expected = [F.conv2d(x[n : n + 1], weights[n], padding=kernel_size // 2) for n in range(len(x))]
    result = modulated_conv2d(x, weight, style, demodulate=demodulate)
    torch.testing.assert_close(result, torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_an_upsampling_convolution_is_upsampling_then_convolution() -> None:
    x, style, weight = noise(2, 4, 4, 4), noise(2, 4), noise(3, 4, 3, 3)
    weights = per_sample_weights(weight, style, demodulate=True)
    wide = upsample(F.pad(x, (2, 2, 2, 2)), TAPS)  # zeros beyond the border are filtered too
    expected = [F.conv2d(wide[n : n + 1], weights[n], padding=1) for n in range(2)]
    result = modulated_conv2d(x, weight, style, TAPS, demodulate=True)
    assert result.shape == (2, 3, 8, 8)
    torch.testing.assert_close(result, torch.cat(expected)[:, :, 4:-4, 4:-4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_downsampling_convolution_is_convolution_then_downsampling(kernel_size: int) -> None:
    layer = EqualisedConv2d(4, 5, kernel_size, down=True).double()
    x = noise(2, 4, 8, 8)
    weight = layer.weight / math.sqrt(4 * kernel_size**2)
    wide = F.conv2d(F.pad(x, (4, 4, 4, 4)), weight, padding=kernel_size // 2)
    torch.testing.assert_close(layer(x), downsample(wide, TAPS)[:, :, 2:-2, 2:-2])


def test_the_gradients_of_a_modulated_convolution_are_exact_twice() -> None:
    x, style, weight = noise(2, 3, 3, 3), noise(2, 3), noise(2, 3, 3, 3)
    inputs = tuple(t.requires_grad_() for t in (x, weight, style))

    def convolve(x: Tensor, weight: Tensor, style: Tensor) -> Tensor:
        return modulated_conv2d(x, weight, style, demodulate=True)

    assert torch.autograd.gradcheck(convolve, inputs, atol=1e-5)
    assert torch.autograd.gradgradcheck(convolve, inputs, atol=1e-4)


@pytest.mark.parametrize("size", [1e-4, 1e5])
def test_a_demodulated_convolution_in_fp16_bears_any_scale_of_weights_and_styles(
    size: float,
) -> None:
    x, style, weight = torch.randn(2, 16, 4, 4), torch.randn(2, 16), torch.randn(8, 16, 3, 3)
    expected = modulated_conv2d(x, weight, style, demodulate=True)
    with torch.autocast("cpu", dtype=torch.float16):
        result = modulated_conv2d(x.half(), weight * size, style * size, demodulate=True)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("learning_rate", [1.0, 0.01])
def test_an_equalised_linear_layer_scales_weights_when_it_runs(learning_rate: float) -> None:
    layer = EqualisedLinear(400, 300, bias=0.5, learning_rate=learning_rate)
    assert float(layer.weight.detach().std()) * learning_rate == pytest.approx(1, rel=0.02)
    effective = layer(torch.eye(400)) - layer(torch.zeros(1, 400))
    torch.testing.assert_close(effective.T, layer.weight * learning_rate / 20)
    torch.testing.assert_close(layer(torch.zeros(1, 400)), torch.full((1, 300), 0.5))


def test_an_equalised_convolution_divides_weights_by_the_root_of_its_fan_in() -> None:
    layer = EqualisedConv2d(16, 32, 3)
    assert float(layer.weight.detach().std()) == pytest.approx(1, rel=0.05)
    impulse = torch.zeros(1, 16, 3, 3)
    impulse[0, 5, 1, 1] = 12.0  # sqrt(16 * 9)
    torch.testing.assert_close(layer(impulse)[0], layer.weight[:, 5].flip(1, 2))


def test_activations_start_with_a_mean_square_near_1() -> None:
    big = {"resolution": 8, "img_channels": 3, "num_classes": 0}
    G = Stylegan2Generator(**big, z_dim=256, base_channels=128, mapping_layers=2)
    D = Stylegan2Discriminator(**big, base_channels=128, residual=True)
    x, w = torch.randn(8, 128, 16, 16), G.mapping(torch.randn(512, 256), None)
    block: Any = D.blocks[0]
    outputs = {
        "mapping": w,
        "modulated layer": G.first(x, w[:8]),
        "convolution and activation": block.main[0](x),
        "convolution": EqualisedConv2d(128, 128, 3)(x)[:, :, 1:-1, 1:-1],
        "linear": EqualisedLinear(128, 128)(torch.randn(512, 128)),
    }
    for name, output in outputs.items():
        assert float(output.detach().square().mean()) == pytest.approx(1, rel=0.2), name
    style = G.first.conv.affine(w)
    assert float(style.detach().mean()) == pytest.approx(1, rel=0.1)


def test_the_size_of_a_latent_or_a_label_embedding_does_not_matter() -> None:
    G, z, labels = generator(num_classes=3), torch.randn(3, Z_DIM), torch.arange(3)
    before = G(z, labels)
    torch.testing.assert_close(G(7 * z, labels), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(G(-z, labels), before, atol=1e-2)
    assert G.mapping.embedding is not None
    with torch.no_grad():
        G.mapping.embedding.weight.mul_(7)
    torch.testing.assert_close(G(z, labels), before, rtol=1e-4, atol=1e-5)


def test_colours_are_a_modulated_sum_of_channels_without_demodulation() -> None:
    head = generator().first_image
    nn.init.normal_(head.bias)
    x, w = torch.randn(2, WIDTH, 4, 4), torch.randn(2, Z_DIM)
    style = w @ head.conv.affine.weight.T / math.sqrt(Z_DIM) + 1
    weight = head.conv.weight[:, :, 0, 0] / math.sqrt(WIDTH)
    expected = torch.einsum("oi,ni,nihw->nohw", weight, style, x) + head.bias
    torch.testing.assert_close(head(x, w), expected)


def test_an_image_is_the_sum_of_those_of_all_resolutions() -> None:
    G = generator()
    heads: list[Any] = [G.first_image] + [block.to_image for block in G.blocks]
    for value, head in zip((1.0, 10.0, 100.0), heads, strict=True):
        nn.init.zeros_(head.conv.weight)
        nn.init.constant_(head.bias, value)
    images = G(torch.randn(1, Z_DIM))
    torch.testing.assert_close(images[:, :, 3:-3, 3:-3], torch.full((1, 3, 10, 10), 111.0))


@pytest.mark.parametrize("num_classes", [0, 3])
def test_an_image_depends_on_no_other_of_its_batch(num_classes: int) -> None:
    G = generator(num_classes=num_classes)
    z, labels = torch.randn(5, Z_DIM), torch.tensor([0, 1, 2, 0, 1]) if num_classes else None
    together = G(z, labels)
    for n in range(5):
        alone = G(z[n : n + 1], None if labels is None else labels[n : n + 1])
        torch.testing.assert_close(alone[0], together[n], rtol=0, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_logit_depends_on_the_others_only_through_the_minibatch_std(
    residual: bool, num_classes: int
) -> None:
    D = discriminator(residual=residual, num_classes=num_classes)
    last: Any = D.last
    images, labels = torch.randn(5, 3, 16, 16), torch.arange(5) % 3
    before = D(images, labels)
    assert before.shape == (5,)
    assert not torch.allclose(D(images[:2], labels[:2]), before[:2], atol=1e-5)
    nn.init.zeros_(last[1].conv.weight[:, -1:])
    torch.testing.assert_close(D(images[:2], labels[:2]), D(images, labels)[:2])


@pytest.mark.parametrize("num_classes", [0, 3])
def test_labels_matter_if_there_are_classes(num_classes: int) -> None:
    G, D = generator(num_classes=num_classes), discriminator(num_classes=num_classes)
    z, zeros, ones = torch.randn(4, Z_DIM), torch.zeros(4).long(), torch.ones(4).long()
    same_images = torch.equal(G(z, zeros), G(z, ones))
    images = torch.randn(4, 3, 16, 16)
    assert same_images == torch.equal(D(images, zeros), D(images, ones)) == (num_classes == 0)
    if num_classes:
        with pytest.raises(AssertionError, match="needs labels"):
            G(z)


def test_a_conditional_logit_is_a_scaled_product_of_features_and_mapped_label() -> None:
    D = discriminator(num_classes=3)
    seen: list[Tensor] = []
    assert D.label_mapping is not None
    for part in (D.last, D.label_mapping):
        part.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    logits = D(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 2]))
    features, mapped = (t.tolist() for t in seen)
    expected = [
        sum(f * g for f, g in zip(*pair, strict=True)) / 8**0.5
        for pair in zip(features, mapped, strict=True)
    ]
    torch.testing.assert_close(logits, torch.tensor(expected))


def test_a_residual_block_adds_its_skip_over_the_root_of_2() -> None:
    block: Any = discriminator(residual=True).double().blocks[0]
    x = noise(2, WIDTH, 16, 16)
    nn.init.zeros_(block.main[1].conv.weight)
    expected = F.conv2d(downsample(x, TAPS), block.skip.weight / math.sqrt(2 * WIDTH))
    torch.testing.assert_close(block(x), expected)


class _DoubleMinibatchStd(MinibatchStd):
    """The same in fp64, which a finite difference needs."""

    def forward(self, x: Tensor) -> Tensor:
        std = (self.variance(x) + 1e-8).sqrt().mean()
        return torch.cat([x, std.expand(len(x), 1, *x.shape[2:])], dim=1)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_gradient_of_r1_is_its_finite_difference(residual: bool, num_classes: int) -> None:
    D = discriminator(resolution=8, residual=residual, num_classes=num_classes).double()
    last: Any = D.last
    last[0] = _DoubleMinibatchStd()
    images, labels = noise(3, 3, 8, 8), torch.tensor([0, 1, 2])
    parameters = list(D.parameters())
    directions = [torch.randn_like(p) for p in parameters]

    def r1(step: float) -> Tensor:
        moved = {
            name: p + step * direction
            for (name, p), direction in zip(D.named_parameters(), directions, strict=True)
        }
        x = images.clone().requires_grad_()
        logits = torch.func.functional_call(D, moved, (x, labels))
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return gradient.square().sum()

    gradients = torch.autograd.grad(r1(0.0), parameters, allow_unused=True)
    slope = sum(
        float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None
    )
    step = 1e-6
    difference = float((r1(step) - r1(-step)).detach()) / (2 * step)
    assert slope == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_half_precision_is_close_to_fp32(dtype: torch.dtype, residual: bool) -> None:
    G = generator(num_classes=3)
    D = discriminator(num_classes=3, residual=residual)
    z, labels = torch.randn(8, Z_DIM), torch.arange(8) % 3
    images, real = G(z, labels), torch.randn(8, 3, 16, 16)
    logits = D(real, labels)
    with torch.autocast("cpu", dtype=dtype):
        half_images, half_logits = G(z, labels), D(real, labels)
    assert half_images.dtype == half_logits.dtype == torch.float32
    tolerance = 0.01 if dtype == torch.float16 else 0.06
    for half, full in ((half_images, images), (half_logits, logits)):
        assert not torch.equal(half, full)
        error = (half - full).square().mean().sqrt() / full.square().mean().sqrt()
        assert float(error.detach()) < tolerance


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_discriminator_whose_weights_grew_does_not_overflow_fp16(scale: float) -> None:
    D, images = discriminator(), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        for parameter in D.blocks.parameters():
            parameter.mul_(scale)
    with torch.autocast("cpu", dtype=torch.float16):
        features = D.blocks(D.from_image(images))
        logits = D(images)
    assert features.dtype == torch.float16
    assert float(features.detach().abs().max()) <= 256
    assert torch.isfinite(logits).all()
    logits.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in D.parameters())


def test_in_half_precision_the_islands_are_fp32() -> None:
    G, D = generator(num_classes=3), discriminator(num_classes=3)
    seen: dict[str, torch.dtype] = {}
    last: Any = D.last
    block: Any = G.blocks[0]
    parts = {
        "mapping": G.mapping,
        "4x4": G.first,
        "image": block.to_image.conv,
        "style": block.layer1.conv.affine,
        "epilogue": last[1],
        "half": block.layer1,
    }
    for name, part in parts.items():
        part.register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output.dtype})
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        D(G(torch.randn(2, Z_DIM), torch.zeros(2).long()), torch.zeros(2).long())
    assert seen.pop("half") == torch.bfloat16
    assert set(seen.values()) == {torch.float32}
    assert len(seen) == 5


@pytest.mark.parametrize("resolution", [16, 64])
@pytest.mark.parametrize("img_channels", [1, 3, 4])
@pytest.mark.parametrize("num_classes", [0, 2])
def test_every_resolution_and_number_of_channels_trains(
    resolution: int, img_channels: int, num_classes: int
) -> None:
    common = {
        "resolution": resolution,
        "img_channels": img_channels,
        "num_classes": num_classes,
    }
    G, D = generator(**common), discriminator(**common, residual=True)
    labels = torch.tensor([0, 1]) if num_classes else None
    images = G(torch.randn(2, Z_DIM), labels)
    assert images.shape == (2, img_channels, resolution, resolution)
    logits = D(images, labels)
    assert logits.shape == (2,)
    logits.sum().backward()
    for player in (G, D):
        for name, parameter in player.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize("residual", [False, True])
def test_the_cifar_form_has_as_many_parameters_as_counted_by_hand(
    num_classes: int, residual: bool
) -> None:
    with torch.device("meta"):
        common = {"resolution": 32, "img_channels": 3, "base_channels": 512}
        G = Stylegan2Generator(**common, z_dim=512, num_classes=num_classes, mapping_layers=2)
        D = Stylegan2Discriminator(**common, num_classes=num_classes, residual=residual)
    square = 512 * 512 + 512
    conv3x3 = 9 * 512 * 512 + 512
    embedding = num_classes * 512 + 512 if num_classes else 0
    mapping = embedding + 2 * square + (512 * 512 if num_classes else 0)
    styles = (7 + 4) * square
    images = 4 * (512 * 3 + 3)
    assert num_parameters(G) == mapping + 512 * 16 + 7 * conv3x3 + styles + images
    trunk = (3 * 512 + 512) + 6 * conv3x3 + (3 * 512 * 512 if residual else 0)
    epilogue = (9 * 513 * 512 + 512) + (8192 * 512 + 512)
    head = square + embedding + 8 * square if num_classes else 513
    assert num_parameters(D) == trunk + epilogue + head


def test_beyond_32x32_widths_halve_with_every_doubling() -> None:
    with torch.device("meta"):
        D = Stylegan2Discriminator(
            resolution=128, img_channels=3, base_channels=512, num_classes=0, residual=False
        )
    shapes = [
        tuple(p.shape[:2]) for n, p in D.blocks.named_parameters() if n.endswith("conv.weight")
    ]
    expected = [(128, 128), (256, 128), (256, 256), (512, 256)] + 6 * [(512, 512)]
    assert shapes == expected
