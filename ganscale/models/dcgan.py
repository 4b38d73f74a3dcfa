"""DCGAN (Radford, Metz and Chintala, 2016, arXiv 1511.06434), LeakyReLU in both networks.

The generator doubles a 4x4 map up to the resolution with transposed convolutions; the
discriminator mirrors it with strided ones. Batch norm everywhere but at the image and the logit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ganscale.models.convolution import Conv2d

_SLOPE = 0.2
_INIT_STD = 0.02


class DcganGenerator(nn.Module):
    """Latents (N, z_dim) to images (N, img_channels, resolution, resolution) in [-1, 1]."""

    def __init__(self, *, resolution: int, img_channels: int, z_dim: int, base_channels: int):
        super().__init__()
        self.z_dim = z_dim
        widths = _widths(resolution, base_channels)[::-1]
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(z_dim, widths[0], 4, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.LeakyReLU(_SLOPE),
        ]
        for wide, narrow in zip(widths, widths[1:], strict=False):
            layers += [
                # No bias before batch norm, which would subtract it. Kernels of 4 at stride 2
                # overlap evenly, so the result has no checkerboard of unequal counts.
                nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(narrow),
                nn.LeakyReLU(_SLOPE),
            ]
        layers += [nn.ConvTranspose2d(widths[-1], img_channels, 4, stride=2, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        _initialise(self)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        images: Tensor = self.layers(z[:, :, None, None])
        return images


class DcganDiscriminator(nn.Module):
    """Images (N, img_channels, resolution, resolution) to logits (N,); positive means real."""

    def __init__(self, *, resolution: int, img_channels: int, base_channels: int):
        super().__init__()
        widths = _widths(resolution, base_channels)
        layers: list[nn.Module] = [
            # Batch norm next to the image made training unstable (the paper's section 3).
            Conv2d(img_channels, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(_SLOPE),
        ]
        for narrow, wide in zip(widths, widths[1:], strict=False):
            layers += [
                Conv2d(narrow, wide, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(wide),
                nn.LeakyReLU(_SLOPE),
            ]
        layers += [Conv2d(widths[-1], 1, 4)]
        self.layers = nn.Sequential(*layers)
        _initialise(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits.flatten()


def _widths(resolution: int, base_channels: int) -> list[int]:
    """Channels at each resolution from resolution / 2 down to 4."""
    return [base_channels << level for level in range(resolution.bit_length() - 3)]


def _initialise(module: nn.Module) -> None:
    """Weights N(0, 0.02), batch norm scales N(1, 0.02), biases zero: section 4 of the paper."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(part.weight, 0.0, _INIT_STD)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, _INIT_STD)
        bias = getattr(part, "bias", None)
        if isinstance(bias, torch.Tensor):
            nn.init.zeros_(bias)
