"""What the layers inside a network compute, for any architecture.

Forward hooks record it, so that no architecture has to return its features; the price is a whole
forward, even for a layer in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ganscale.models.layers import MinibatchStd
from ganscale.models.stylegan2 import EqualisedConv2d


@contextmanager
def recorded_convolutions(network: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of the convolutions (N, C, H, W), in the order of one forward in the block.

    Those after a minibatch standard deviation are left out, since each depends on all images.
    """
    outputs: list[Tensor] = []
    is_mixed = False

    def record(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        if not is_mixed:
            outputs.append(output)

    def note(*_: object) -> None:
        nonlocal is_mixed
        is_mixed = True

    handles = []
    for part in network.modules():
        # Modulated convolutions are left out: only generators have them.
        if isinstance(part, nn.Conv2d | EqualisedConv2d):
            handles.append(part.register_forward_hook(record))
        elif isinstance(part, MinibatchStd):
            handles.append(part.register_forward_hook(note))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def middle_features(network: nn.Module, images: Tensor, condition: Tensor | None) -> Tensor:
    """Spatial features: the output of the last convolution whose map has a quarter of the side.

    Returns (N, C, h, w) with h at least H / 4. The network is called as a discriminator.
    """
    with recorded_convolutions(network) as outputs:
        network(images, condition)
    # Deeper features say what is there but no longer where, earlier ones are close to pixels.
    return [maps for maps in outputs if 4 * maps.shape[-1] >= images.shape[-1]][-1]
