"""An encoder for any of the generators: images to a Gaussian over latents.

A mirror of the DCGAN generator (Radford et al. 2016, arXiv 1511.06434): strided convolutions with
batch norm down to 4x4. Its width is that next to the image of the architecture it encodes for.
"""

from __future__ import annotations

from torch import Tensor, nn

_SLOPE = 0.2
_INIT_STD = 0.02
_MAX_CHANNELS = 512


class Encoder(nn.Module):
    """Images (N, img_channels, resolution, resolution) to mean and log-variance, each (N, z_dim).

    Both are fp32 whatever the precision around them.
    """

    def __init__(self, *, resolution: int, img_channels: int, z_dim: int, base_channels: int):
        super().__init__()
        self.z_dim = z_dim
        levels = range(resolution.bit_length() - 3)
        # Capped: `base_channels` may be that of an architecture that is wide at every resolution.
        widths = [min(base_channels << level, _MAX_CHANNELS) for level in levels]
        layers: list[nn.Module] = [
            nn.Conv2d(img_channels, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(_SLOPE),
        ]
        for narrow, wide in zip(widths, widths[1:], strict=False):
            layers += [
                nn.Conv2d(narrow, wide, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(wide),
                nn.LeakyReLU(_SLOPE),
            ]
        layers += [nn.Conv2d(widths[-1], 2 * z_dim, 4)]
        self.layers = nn.Sequential(*layers)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.0, _INIT_STD)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # fp32, since the log-variance is exponentiated.
        mean, log_variance = self.layers(images).flatten(1).float().split(self.z_dim, dim=1)
        return mean, log_variance
