"""Exponential moving average of a model's weights, with its half-life counted in images.

    ema <- beta * ema + (1 - beta) * weights,   beta = 0.5 ** (batch_size / halflife)

so the average means the same at any batch size (Karras et al. 2020, arXiv 1912.04958, appendix B).
Buffers (batch statistics) are copied.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def ema_weight(batch_size: int, halflife_nimg: float) -> float:
    """1 - beta, the weight of the new weights in one update of `batch_size` images.

    With a half-life of 0 it is 1: the average follows the weights at once.
    """
    return 1.0 - 0.5 ** (batch_size / halflife_nimg) if halflife_nimg > 0 else 1.0


class Ema:
    """Holds the averaged copy as `model`, in evaluation mode and without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, weight: Tensor) -> None:
        """Move towards `model` by `weight`, a 0-dim tensor in [0, 1] on the model's device.

        The weight is a tensor and not a number, so that a captured graph sees its schedule.
        """
        for average, current in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(current, weight)
        # Copied and not averaged, as in StyleGAN2-ADA's code; some are counters, which have no
        # average. One launch for all of a type, where spectral norm has two buffers a layer.
        buffers: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for kept, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            copies, sources = buffers.setdefault(buffer.dtype, ([], []))
            copies.append(kept)
            sources.append(buffer)
        for copies, sources in buffers.values():
            torch._foreach_copy_(copies, sources)
