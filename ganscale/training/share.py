"""What a step is given: a rank's part of a global batch, and the moment it is taken at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ganscale.data.values import PIXELS, ValueRange
from ganscale.generation.latents import StepRandomness

__all__ = ["Labelled", "Moment", "Share", "network_input"]


@dataclass(frozen=True)
class Labelled:
    """Images whose labels are learnt from where most have none; as many as the share has."""

    images: Tensor
    """(n, C, H, W) in [-1, 1]"""
    labels: Tensor
    """int64 (n,)"""


@dataclass(frozen=True)
class Share:
    """A rank's part of one global batch.

    It may be of any size. Losses are summed and multiplied by `weight`, so that the gradient that
    DDP averages over W ranks is that of the mean over the global batch.
    """

    real_images: Tensor
    """(n, C, H, W) in [-1, 1]"""
    labels: Tensor | None
    """int64 (n,), of real images and of the fakes beside them; None without classes."""
    random: StepRandomness
    z_dim: int
    weight: float
    """W / B."""
    labelled: Labelled | None = None
    """For methods that learn from some labels only."""


@dataclass(frozen=True)
class Moment:
    """When a step is taken."""

    nimg: int = 0
    """The position before it."""
    step: int = 0
    """Steps before it."""
    batch_size: int = 1
    """Of the global batch."""
    lr_factor: float = 1.0
    """What learning rates are multiplied by."""
    generator_learns: bool = True
    """False in those steps of which the discriminator has more than the others."""

    @property
    def nimg_after(self) -> int:
        """The position after the step."""
        return self.nimg + self.batch_size


def network_input(pixels: Tensor, values: ValueRange = PIXELS) -> Tensor:
    """Stored (n, C, H, W) to [-1, 1], with the channels last in memory."""
    return values.to_network(pixels).contiguous(memory_format=torch.channels_last)
