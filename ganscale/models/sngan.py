"""SNGAN's residual players (Miyato et al. 2018, arXiv 1802.05957, appendix B.4, table 4).

The generator doubles a 4x4 map with residual blocks and batch norm; the discriminator halves the
image down to 8x8, adds two blocks there, sums over the map, and has spectral norm on every weight.
With classes: conditional batch norm and the projection logit (Miyato and Koyama 2018, arXiv
1802.05637). `base_channels` is the discriminator's width up to 32x32 (128 in the paper); the
generator's is twice that. Beyond 32x32 widths halve with every doubling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.models.conditioning import ConditionalBatchNorm2d, ProjectionHead
from ganscale.models.layers import spectral_norm

__all__ = ["SnganDiscriminator", "SnganGenerator"]

_FULL_WIDTH_RESOLUTION = 32


class SnganGenerator(nn.Module):
    """Latents (N, z_dim) to images (N, img_channels, resolution, resolution) in [-1, 1]."""

    def __init__(
        self,
        *,
        resolution: int,
        img_channels: int,
        z_dim: int,
        base_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        width = 2 * base_channels
        self.linear = nn.Linear(z_dim, width * 4 * 4)
        self.blocks = nn.ModuleList()
        size = 4
        while size < resolution:
            size *= 2
            out = _width(2 * base_channels, size)
            self.blocks.append(_UpBlock(width, out, num_classes))
            width = out
        self.last = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, img_channels, 3, padding=1),
            nn.Tanh(),
        )
        _initialise(self)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x: Tensor = self.linear(z).unflatten(1, (-1, 4, 4))
        for block in self.blocks:
            x = block(x, labels)
        images: Tensor = self.last(x)
        return images


class SnganDiscriminator(nn.Module):
    """Images (N, img_channels, resolution, resolution) to logits (N,); positive means real."""

    def __init__(
        self, *, resolution: int, img_channels: int, base_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        width = _width(base_channels, resolution)
        blocks: list[nn.Module] = [_FirstDownBlock(img_channels, width)]
        size = resolution // 2
        while size > 8:
            out = _width(base_channels, size)
            blocks.append(_DownBlock(width, out, down=True))
            width, size = out, size // 2
        blocks += [_DownBlock(width, base_channels, down=False)]
        blocks += [_DownBlock(base_channels, base_channels, down=False)]
        self.blocks = nn.Sequential(*blocks)
        embedding = nn.Embedding(num_classes, base_channels) if num_classes else None
        self.head = ProjectionHead(nn.Linear(base_channels, 1), embedding)
        _initialise(self)
        for part in [p for p in self.modules() if isinstance(p, _WEIGHTED)]:
            spectral_norm(part)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.blocks(images)
        logits: Tensor = self.head(x.relu().float().sum(dim=(2, 3)), labels)
        return logits


class _UpBlock(nn.Module):
    """Norm, ReLU, nearest upsampling and two 3x3 convolutions, beside a 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm1 = _Norm(in_channels, num_classes)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _Norm(out_channels, num_classes)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h: Tensor = F.interpolate(self.norm1(x, labels).relu(), scale_factor=2.0)
        h = self.conv2(self.norm2(self.conv1(h), labels).relu())
        shortcut: Tensor = self.shortcut(F.interpolate(x, scale_factor=2.0))
        return h + shortcut


class _Norm(nn.Module):
    """Batch norm, with each class's own gain and bias where there are classes."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(num_features)
        if num_classes:
            embeddings = [nn.Embedding(num_classes, num_features) for _ in range(2)]
            for embedding in embeddings:
                nn.init.zeros_(embedding.weight)
            self.norm = ConditionalBatchNorm2d(num_features, *embeddings)
        self.conditional = num_classes > 0

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        normalised: Tensor = self.norm(x, labels) if self.conditional else self.norm(x)
        return normalised


class _FirstDownBlock(nn.Module):
    """Two convolutions without an activation before them, halved, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.avg_pool2d(self.conv2(self.conv1(x).relu()), 2)
        shortcut: Tensor = self.shortcut(F.avg_pool2d(x, 2))
        return h + shortcut


class _DownBlock(nn.Module):
    """ReLU and two 3x3 convolutions, halved or not, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        learnt = down or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if learnt else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv2(self.conv1(x.relu()).relu()) + self.shortcut(x)
        return F.avg_pool2d(h, 2) if self.down else h


_WEIGHTED = (nn.Conv2d, nn.Linear, nn.Embedding)


def _width(channels: int, resolution: int) -> int:
    return max(1, channels * _FULL_WIDTH_RESOLUTION // max(resolution, _FULL_WIDTH_RESOLUTION))


def _initialise(module: nn.Module) -> None:
    """Weights uniform with a variance of 2 / (fan_in + fan_out), doubled inside blocks; no bias."""
    for name, part in module.named_modules():
        if not isinstance(part, nn.Conv2d | nn.Linear):
            continue
        inside = name.endswith(("conv1", "conv2"))
        nn.init.xavier_uniform_(part.weight, gain=2**0.5 if inside else 1.0)
        assert isinstance(part.bias, torch.Tensor)
        nn.init.zeros_(part.bias)
