"""What the layers inside a network compute, for any architecture.

Forward hooks record it, so that no architecture has to return its features; the price is a whole
forward, even for a layer in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ganscale.models.stylegan2 import EqualisedConv2d


@contextmanager
def recorded_convolutions(network: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of all convolutions (N, C, H, W), in the order of the forwards in the block."""
    outputs: list[Tensor] = []
    handles = [
        part.register_forward_hook(lambda _, __, output: outputs.append(output))
        for part in network.modules()
        # Modulated convolutions are left out: only generators have them.
        if isinstance(part, nn.Conv2d | EqualisedConv2d)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def middle_features(network: nn.Module, images: Tensor, condition: Tensor | None) -> Tensor:
    """Features that know what is where: of the last convolution at a quarter of the resolution.

    Returns (N, C, h, w) with h at least H / 4. The network is called as a discriminator.
    """
    with recorded_convolutions(network) as outputs:
        network(images, condition)
    # Deeper features say what is there but no longer where, earlier ones are close to pixels.
    return [maps for maps in outputs if 4 * maps.shape[-1] >= images.shape[-1]][-1]
