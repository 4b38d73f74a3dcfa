"""The residual blocks of SNGAN and BigGAN, and how wide they are.

Two 3x3 convolutions beside a shortcut (He et al. 2016, arXiv 1603.05027, with the activation before
the convolution). A shortcut is a 1x1 convolution where size or width change, taken on the smaller
map: it commutes with repeating and with averaging pixels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.models.convolution import Conv2d

_FULL_WIDTH_RESOLUTION = 32


def width_at(resolution: int, channels: int) -> int:
    """`channels` up to 32x32, halved with every doubling beyond."""
    return max(1, channels * _FULL_WIDTH_RESOLUTION // max(resolution, _FULL_WIDTH_RESOLUTION))


class UpBlock(nn.Module):
    """(N, in, H, W) to (N, out, 2H, 2W), repeating pixels.

    `norm1` is over in_channels, `norm2` over out_channels; both take (x, condition).
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm1: nn.Module, norm2: nn.Module
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm2
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        h: Tensor = F.interpolate(self.norm1(x, condition).relu(), scale_factor=2.0)
        h = self.conv2(self.norm2(self.conv1(h), condition).relu())
        return h + F.interpolate(self.shortcut(x), scale_factor=2.0)


class DownBlock(nn.Module):
    """(N, in, H, W) to (N, out, H/2, W/2) by averages, or the same size; no norms.

    The first block of a network sees the image and has no activation before it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, down: bool, first: bool = False
    ) -> None:
        super().__init__()
        self.down = down
        # A ReLU on pixels would throw away everything below mid-gray.
        self.activation = nn.Identity() if first else nn.ReLU()
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        learnt = down or in_channels != out_channels
        self.shortcut = Conv2d(in_channels, out_channels, 1) if learnt else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv2(self.conv1(self.activation(x)).relu())
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        shortcut: Tensor = self.shortcut(x)
        return h + shortcut
