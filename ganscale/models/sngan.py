"""SNGAN's residual networks (Miyato et al. 2018, arXiv 1802.05957, appendix B.4, table 4).

The generator doubles a 4x4 map with residual blocks and batch norm; the discriminator halves the
image down to 8x8, adds two blocks there, sums over the map, and has spectral norm on every weight.
With classes: conditional batch norm and the projection logit (Miyato and Koyama 2018, arXiv
1802.05637). `base_channels` is the discriminator's width up to 32x32 (128 in the paper); the
generator's is twice that. Beyond 32x32 widths halve with every doubling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ganscale.models.conditioning import ClassBatchNorm2d, ProjectionHead
from ganscale.models.layers import spectral_norm_everywhere
from ganscale.models.residual import DownBlock, UpBlock, width_at


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
            out = width_at(size, 2 * base_channels)
            norms = ClassBatchNorm2d(width, num_classes), ClassBatchNorm2d(out, num_classes)
            self.blocks.append(UpBlock(width, out, *norms))
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
        width = width_at(resolution, base_channels)
        blocks: list[nn.Module] = [DownBlock(img_channels, width, down=True, first=True)]
        size = resolution // 2
        while size > 8:
            out = width_at(size, base_channels)
            blocks.append(DownBlock(width, out, down=True))
            width, size = out, size // 2
        blocks += [DownBlock(width, base_channels, down=False)]
        blocks += [DownBlock(base_channels, base_channels, down=False)]
        self.blocks = nn.Sequential(*blocks)
        embedding = nn.Embedding(num_classes, base_channels) if num_classes else None
        self.head = ProjectionHead(nn.Linear(base_channels, 1), embedding)
        _initialise(self)
        spectral_norm_everywhere(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x: Tensor = self.blocks(images).relu()
        # Summed and not averaged, as in the paper; in fp32, as a sum of 64 values has more digits
        # than half precision holds.
        features = x.sum(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        logits: Tensor = self.head(features, labels)
        return logits


def _initialise(module: nn.Module) -> None:
    """Weights uniform with a variance of 2 / (fan_in + fan_out), doubled inside blocks; no bias."""
    for name, part in module.named_modules():
        if not isinstance(part, nn.Conv2d | nn.Linear):
            continue
        inside = name.endswith(("conv1", "conv2"))
        nn.init.xavier_uniform_(part.weight, gain=2**0.5 if inside else 1.0)
        assert isinstance(part.bias, torch.Tensor)
        nn.init.zeros_(part.bias)
