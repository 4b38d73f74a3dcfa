"""A discriminator of pairs: an image and a latent (Donahue et al. 2017, arXiv 1605.09782).

Both are brought to vectors, which a small network compares. Spectral norm everywhere (Miyato et al.
2018, arXiv 1802.05957), so that no batch statistics tie the pairs of a batch to each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ganscale.models.convolution import Conv2d
from ganscale.models.layers import spectral_norm

_SLOPE = 0.2
_MAX_CHANNELS = 512


class JointDiscriminator(nn.Module):
    """Images (N, img_channels, resolution, resolution) and latents (N, z_dim) to logits (N,).

    A positive logit means an image that is real, with the latent that the encoder gave it.
    """

    def __init__(self, *, resolution: int, img_channels: int, z_dim: int, base_channels: int):
        super().__init__()
        levels = range(resolution.bit_length() - 3)
        widths = [min(base_channels << level, _MAX_CHANNELS) for level in levels]
        channels = [img_channels, *widths]
        layers: list[nn.Module] = []
        for narrow, wide in zip(channels, channels[1:], strict=False):
            layers += [_convolution(narrow, wide, stride=2, padding=1), nn.LeakyReLU(_SLOPE)]
        size = 2 * widths[-1]
        self.image = nn.Sequential(
            *layers, _convolution(widths[-1], size), nn.LeakyReLU(_SLOPE), nn.Flatten()
        )
        self.latent = nn.Sequential(*_linear(z_dim, size), *_linear(size, size))
        self.pair = nn.Sequential(*_linear(2 * size, size), spectral_norm(nn.Linear(size, 1)))

    def forward(self, images: Tensor, z: Tensor) -> Tensor:
        # Joined as vectors of one size, so that neither side drowns the other.
        vectors = torch.cat([self.image(images), self.latent(z)], dim=1)
        logits: Tensor = self.pair(vectors)
        return logits.flatten()


def _convolution(narrow: int, wide: int, *, stride: int = 1, padding: int = 0) -> nn.Module:
    return spectral_norm(Conv2d(narrow, wide, 4, stride=stride, padding=padding))


def _linear(narrow: int, wide: int) -> tuple[nn.Module, nn.Module]:
    return spectral_norm(nn.Linear(narrow, wide)), nn.LeakyReLU(_SLOPE)
