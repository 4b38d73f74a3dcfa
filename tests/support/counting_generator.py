"""A generator that counts the rows that its network is run with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ganscale.generation.sampler import SampleableGenerator

SPEC = {"resolution": 8, "z_dim": 8, "num_classes": 0}


class CountingNetwork(nn.Module):
    """A seeded linear map of z to images (n, 3, 8, 8) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.randn(8, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))
        self.weights = nn.Parameter(weights)
        self.num_rows = 0

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        self.num_rows += len(z)
        images: Tensor = (z @ self.weights).tanh().unflatten(1, (3, 8, 8))
        return images


def counting_generator() -> tuple[CountingNetwork, SampleableGenerator]:
    """The network and the generator that draws from it."""
    network = CountingNetwork()
    return network, SampleableGenerator(network, spec=SPEC, info={})
