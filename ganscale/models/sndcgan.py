"""SNGAN's plain networks (Miyato et al. 2018, arXiv 1802.05957, appendix B.4, table 3): fast ones.

The generator doubles a 4x4 map with transposed convolutions and batch norm. The discriminator takes
a 3x3 convolution and a strided 4x4 one at each resolution, with spectral norm on every weight. Two
things are as in later code (Kurach et al. 2019, arXiv 1807.04720): batch norm and ReLU after the
generator's linear layer too. Instead of the paper's linear layer over the whole last map,
features are summed over it, as in the paper's residual form; so labels enter as there:
class-conditional batch norm and the projection logit (Miyato and Koyama 2018, arXiv 1802.05637).
`base_channels` is the width next to the image (64 in the paper); it doubles with every halving of
the resolution, up to eight times as wide.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ganscale.models.conditioning import ClassBatchNorm2d, ProjectionHead
from ganscale.models.convolution import Conv2d
from ganscale.models.layers import spectral_norm_everywhere

_SLOPE = 0.1
_INIT_STD = 0.02
_LARGEST_FACTOR = 8


class SndcganGenerator(nn.Module):
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
        widths = _widths(resolution, base_channels)[::-1]
        self.linear = nn.Linear(z_dim, widths[0] * 4 * 4)
        self.norms = nn.ModuleList(ClassBatchNorm2d(width, num_classes) for width in widths)
        self.ups = nn.ModuleList(
            # No bias before batch norm, which would subtract it.
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False)
            for wide, narrow in zip(widths, widths[1:], strict=False)
        )
        self.last = nn.Sequential(nn.Conv2d(widths[-1], img_channels, 3, padding=1), nn.Tanh())
        _initialise(self)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x: Tensor = self.linear(z).unflatten(1, (-1, 4, 4))
        x = self.norms[0](x, labels).relu()
        for up, norm in zip(self.ups, self.norms[1:], strict=True):
            x = norm(up(x), labels).relu()
        images: Tensor = self.last(x)
        return images


class SndcganDiscriminator(nn.Module):
    """Images (N, img_channels, resolution, resolution) to logits (N,); positive means real."""

    def __init__(
        self, *, resolution: int, img_channels: int, base_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = img_channels
        *strided, last = _widths(resolution, base_channels)
        for width in strided:
            layers += [Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(_SLOPE)]
            layers += [Conv2d(width, width, 4, stride=2, padding=1), nn.LeakyReLU(_SLOPE)]
            channels = width
        layers += [Conv2d(channels, last, 3, padding=1), nn.LeakyReLU(_SLOPE)]
        self.layers = nn.Sequential(*layers)
        embedding = nn.Embedding(num_classes, last) if num_classes else None
        self.head = ProjectionHead(nn.Linear(last, 1), embedding)
        _initialise(self)
        spectral_norm_everywhere(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x: Tensor = self.layers(images)
        # In fp32, as a sum over a map has more digits than half precision holds.
        features = x.sum(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        logits: Tensor = self.head(features, labels)
        return logits


def _widths(resolution: int, base_channels: int) -> list[int]:
    """Channels at each resolution from that of the image down to 4."""
    num_sizes = resolution.bit_length() - 2
    return [base_channels * min(1 << level, _LARGEST_FACTOR) for level in range(num_sizes)]


def _initialise(module: nn.Module) -> None:
    """Weights N(0, 0.02), biases zero; class embeddings of norms stay as they are."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(part.weight, 0.0, _INIT_STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
