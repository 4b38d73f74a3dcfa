"""A discriminator that tells classes apart (Salimans et al. 2016, arXiv 1606.03498, section 5).

K logits l of classes, and a logit of being real: log sum exp l, since the K + 1-st class, fake, can
be held at 0. So what is learnt from labels and what is learnt from fakes is one network. Three 3x3
convolutions at each resolution down to 8x8, the mean over the map, weight norm (Salimans and Kingma
2016, arXiv 1602.07868): no batch statistics that would mix labelled, real and made images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ganscale.models.convolution import Conv2d

_SLOPE = 0.2
_LAYERS_PER_STAGE = 3
_SMALLEST_MAP = 8


class ClassifyingDiscriminator(nn.Module):
    """Images (N, img_channels, resolution, resolution) to logits (N,); positive means real.

    With `classes=True` it returns the logits of the classes, (N, num_classes).
    """

    def __init__(self, *, resolution: int, img_channels: int, base_channels: int, num_classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels, width, size = img_channels, base_channels, resolution
        while size >= _SMALLEST_MAP:
            for place in range(_LAYERS_PER_STAGE):
                shrinks = place == _LAYERS_PER_STAGE - 1 and size > _SMALLEST_MAP
                layers += [_convolution(channels, width, 2 if shrinks else 1), nn.LeakyReLU(_SLOPE)]
                channels = width
            width, size = 2 * base_channels, size // 2
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, classes: bool = False
    ) -> Tensor:
        # fp32 before logsumexp, which exponentiates.
        logits: Tensor = self.head(self.features(images)).float()
        return logits if classes else torch.logsumexp(logits, dim=1)

    def features(self, images: Tensor) -> Tensor:
        """Means of the last maps, (N, C): what classes are told from, and generators match."""
        pooled: Tensor = self.body(images).mean((2, 3))
        return pooled


def _convolution(narrow: int, wide: int, stride: int) -> nn.Module:
    convolution = Conv2d(narrow, wide, 3, stride=stride, padding=1)
    # Before weight norm, which takes direction and norm from the weight it finds.
    nn.init.kaiming_normal_(convolution.weight, _SLOPE)
    normed: nn.Module = weight_norm(convolution)
    return normed
