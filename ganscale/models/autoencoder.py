"""An encoder and a generator as one network, for methods in which they share a loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Encoded(NamedTuple):
    """What an autoencoder makes of images."""

    images: Tensor
    """Reconstructions, (N, C, H, W) in [-1, 1]."""
    mean: Tensor
    """Of the latents, (N, z_dim)."""
    log_variance: Tensor
    fakes: Tensor | None = None
    """Images of the mixed latents, where there are any."""


class Autoencoder(nn.Module):
    """Images to latents and back.

    All of it is one forward, since DDP averages the gradients of what one forward has made.
    """

    def __init__(self, encoder: nn.Module, generator: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.generator = generator

    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        prior: Tensor | None = None,
        from_prior: Tensor | None = None,
    ) -> Encoded:
        """Encode, draw latents with `noise` ~ N(0, 1) (N, z_dim), and generate.

        With `prior` (N, z_dim) there are also fakes: of those latents in the rows where
        `from_prior` (N, 1) is true, of the encoded ones elsewhere; no gradient goes from them to
        the encoder.
        """
        mean, log_variance = self.encoder(images)
        z = sampled(mean, log_variance, noise)
        fakes = None
        if prior is not None and from_prior is not None:
            # Detached: the encoder does not learn from the adversarial loss (Larsen et al. 2016,
            # algorithm 1).
            fakes = self.generator(torch.where(from_prior, prior, z.detach()), labels)
        return Encoded(self.generator(z, labels), mean, log_variance, fakes)


def sampled(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Latents of the posterior: mean + standard deviation * noise."""
    # The reparametrisation (Kingma and Welling 2014, section 2.4): noise comes from outside, so the
    # gradient reaches mean and variance.
    return mean + torch.exp(log_variance / 2) * noise
