"""R3GAN, configuration E (Huang et al. 2024, arXiv 2501.05441): plain residual networks, no norms.

Both are stages of inverted bottlenecks: 1x1 to twice the width, grouped 3x3, 1x1 back,
with a leaky ReLU after each of the first two and only two biases, before those. The generator
starts from a learnt 4x4 basis, the discriminator ends in a depthwise 4x4 one. Weights start as He
et al. (2015) have them, scaled by Fixup's L^(-1/(2m-2)) for L blocks of m layers (Zhang et al.
2019, arXiv 1901.09321), the last layer of each block at zero, so at the start a network is its
resampling and two linear maps.

The 4x4 stage, the image and the logit are computed in fp32 under every precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ganscale.models.conditioning import ProjectionHead, one_hot
from ganscale.models.convolution import Conv2d
from ganscale.models.fused import bias_leaky_relu
from ganscale.models.layers import (
    FullPrecision,
    binomial_filter,
    downsample,
    side_lengths,
    upsample,
    without_autocast,
)
from ganscale.models.residual import width_at

_SLOPE = 0.2
# He et al. (2015, arXiv 1502.01852): keeps the variance through a leaky ReLU.
_GAIN = math.sqrt(2 / (1 + _SLOPE**2))
_EXPANSION = 2
_GROUP_CHANNELS = 16
_LAYERS_PER_BLOCK = 3
_EMBEDDING_DIM = 64


class R3ganGenerator(nn.Module):
    """Latents (N, z_dim) to images (N, img_channels, resolution, resolution), not bounded.

    `base_channels` is the width up to 32x32 (768 in the paper), halved with every doubling beyond;
    the label's embedding of 64 is put beside the latent.
    """

    def __init__(
        self,
        *,
        resolution: int,
        img_channels: int,
        z_dim: int,
        base_channels: int,
        num_classes: int,
        blocks_per_stage: int,
    ) -> None:
        super().__init__()
        sizes = side_lengths(resolution)
        # L of Fixup counts the blocks of the whole network, not of a stage.
        num_blocks = blocks_per_stage * len(sizes)
        self.num_classes = num_classes
        embedding = _linear(num_classes, _EMBEDDING_DIM) if num_classes else None
        self.embedding = embedding
        condition_dim = z_dim + (_EMBEDDING_DIM if num_classes else 0)
        self.basis = nn.Parameter(torch.randn(base_channels, 4, 4))
        self.linear = _linear(condition_dim, base_channels)
        self.first = FullPrecision(*_blocks(base_channels, blocks_per_stage, num_blocks))
        stages: list[nn.Module] = []
        for before, size in zip(sizes, sizes[1:], strict=False):
            width = width_at(size, base_channels)
            stages.append(_Resample(width_at(before, base_channels), width, up=True))
            stages += _blocks(width, blocks_per_stage, num_blocks)
        self.stages = nn.Sequential(*stages)
        self.to_image = FullPrecision(_conv1x1(width_at(resolution, base_channels), img_channels))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        with without_autocast(z):
            if self.embedding is not None:
                label = one_hot(labels, self.num_classes).to(z.dtype)
                z = torch.cat([z, self.embedding(label)], dim=1)
            # Each channel of the first map is a learnt 4x4 pattern times a linear form of the
            # latent.
            x = self.linear(z)[:, :, None, None] * self.basis
        images: Tensor = self.to_image(self.stages(self.first(x)))
        return images


class R3ganDiscriminator(nn.Module):
    """Images (N, img_channels, resolution, resolution) to logits (N,); positive means real."""

    def __init__(
        self,
        *,
        resolution: int,
        img_channels: int,
        base_channels: int,
        num_classes: int,
        blocks_per_stage: int,
    ) -> None:
        super().__init__()
        sizes = side_lengths(resolution)[::-1]
        num_blocks = blocks_per_stage * len(sizes)
        self.from_image = _conv1x1(img_channels, width_at(resolution, base_channels))
        stages: list[nn.Module] = []
        for size, after in zip(sizes, sizes[1:], strict=False):
            width = width_at(size, base_channels)
            stages += _blocks(width, blocks_per_stage, num_blocks)
            stages.append(_Resample(width, width_at(after, base_channels), up=False))
        self.stages = nn.Sequential(*stages)
        # The mirror image of the generator's basis: one 4x4 pattern for each channel, without
        # padding.
        self.last = FullPrecision(
            *_blocks(base_channels, blocks_per_stage, num_blocks), _DepthwiseSum(base_channels)
        )
        if num_classes:
            self.head: nn.Module = _Projection(base_channels, num_classes)
        else:
            self.head = ProjectionHead(_linear(base_channels, 1), None)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.last(self.stages(self.from_image(images))), labels)
        return logits


class _DepthwiseSum(nn.Module):
    """A depthwise 4x4 convolution of a 4x4 map, (N, C, 4, 4) to (N, C).

    Written as a product and a sum: as a convolution it is a launch a channel on a GPU.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 4, 4))
        _he(self.weight, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight.squeeze(1)).sum(dim=(2, 3))


class _Projection(nn.Module):
    """Logits <W features, embed(y)>: the projection logit alone, without a part for all classes."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = _linear(features, features)
        # The logit is a sum over all features; this keeps it from growing with their number.
        self.embedding = _linear(num_classes, features, gain=1 / math.sqrt(features))
        self.num_classes = num_classes

    def forward(self, features: Tensor, labels: Tensor | None) -> Tensor:
        with without_autocast(features):
            embedded = self.embedding(one_hot(labels, self.num_classes).to(features.dtype))
            logits: Tensor = (self.linear(features) * embedded).sum(dim=1)
        return logits


class _Block(nn.Module):
    """x + conv1x1(act(conv3x3(act(conv1x1(x))))), the middle one in groups of 16 channels."""

    def __init__(self, channels: int, num_blocks: int) -> None:
        super().__init__()
        inner = _EXPANSION * channels
        groups = inner // _GROUP_CHANNELS
        self.expand = Conv2d(channels, inner, 1, adds_bias=False)
        self.mix = Conv2d(inner, inner, 3, padding=1, groups=groups, adds_bias=False)
        self.contract = Conv2d(inner, channels, 1, bias=False)
        fixup = num_blocks ** (-1 / (2 * _LAYERS_PER_BLOCK - 2))
        for conv in (self.expand, self.mix):
            _he(conv.weight, _GAIN * fixup)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        # At the start each block passes its input on, however many there are.
        nn.init.zeros_(self.contract.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = bias_leaky_relu(self.expand(x), self.expand.bias, _SLOPE)
        h = bias_leaky_relu(self.mix(h), self.mix.bias, _SLOPE)
        contracted: Tensor = self.contract(h)
        return x + contracted


class _Resample(nn.Module):
    """Twice or half the side, and a 1x1 where the width changes.

    The filter is [1, 3, 3, 1] / 8, which doubles a side by bilinear interpolation: the published
    code convolves the [1, 2, 1] of its configuration with the [1, 1] of the finer grid.
    """

    taps: Tensor

    def __init__(self, in_channels: int, out_channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.register_buffer("taps", binomial_filter(), persistent=False)
        same = in_channels == out_channels
        self.conv = nn.Identity() if same else _conv1x1(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            # A 1x1 convolution and a filter over space commute; it is taken where the map is
            # smaller.
            return upsample(self.conv(x), self.taps)
        resampled: Tensor = self.conv(downsample(x, self.taps))
        return resampled


def _blocks(channels: int, number: int, num_blocks: int) -> list[nn.Module]:
    return [_Block(channels, num_blocks) for _ in range(number)]


def _conv1x1(in_channels: int, out_channels: int) -> Conv2d:
    conv = Conv2d(in_channels, out_channels, 1, bias=False)
    _he(conv.weight, 1.0)
    return conv


def _linear(in_features: int, out_features: int, *, gain: float = 1.0) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=False)
    _he(linear.weight, gain)
    return linear


def _he(weight: Tensor, gain: float) -> None:
    """N(0, gain^2 / fan_in)."""
    nn.init.normal_(weight, 0.0, gain / math.sqrt(weight[0].numel()))
