"""Exponential moving average of a model's weights, with its half-life counted in images.

    ema <- beta * ema + (1 - beta) * weights,   beta = 0.5 ** (batch_size / halflife)

so the average means the same at any batch size (Karras et al. 2020, arXiv 1912.04958, appendix B).
Buffers (batch statistics) are copied.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["Ema"]


class Ema:
    """Holds the averaged copy as `model`, in evaluation mode and without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, batch_size: int, *, halflife_nimg: float) -> None:
        """Move towards `model` by one step of `batch_size` images; with 0, follow it at once."""
        beta = 0.5 ** (batch_size / halflife_nimg) if halflife_nimg > 0 else 0.0
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1.0 - beta)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
