"""How labels enter the networks: embeddings, class-conditional batch norm, the projection logit.

Labels are int64 (N,) in 0..num_classes-1. With `num_classes` = 0 a model is unconditional and
ignores them; None may then be given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.models.layers import at_least_fp32, without_autocast


def one_hot(labels: Tensor | None, num_classes: int) -> Tensor:
    """Labels (N,) as fp32 unit vectors, (N, num_classes), without a host read."""
    assert labels is not None, "a class-conditional model needs labels"
    # F.one_hot checks the range of labels by a host read in the step; a lookup does so without.
    return F.embedding(labels, torch.eye(num_classes, device=labels.device))


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm whose gain and bias are linear in a condition (N, condition_dim).

    De Vries et al. (2017, arXiv 1707.00683), as in BigGAN (Brock et al. 2019, arXiv 1809.11096,
    appendix B): the gain is 1 plus a projection of the condition, the bias another.
    """

    def __init__(self, num_features: int, gain: nn.Module, bias: nn.Module) -> None:
        super().__init__()
        # A plain batch norm inside, so that one of the global batch can take its place from
        # outside.
        self.norm = nn.BatchNorm2d(num_features, affine=False)
        self.gain = gain
        self.bias = bias

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain: Tensor = self.gain(condition)[:, :, None, None]
        bias: Tensor = self.bias(condition)[:, :, None, None]
        normalised: Tensor = self.norm(x)
        # Around 1: a condition that says nothing leaves the map as it is.
        return normalised * (1 + gain) + bias


class ClassBatchNorm2d(nn.Module):
    """Batch norm, with each class's own gain and bias where there are classes."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(num_features)
        if num_classes:
            embeddings = [nn.Embedding(num_classes, num_features) for _ in range(2)]
            for embedding in embeddings:
                # Gain 1 and bias 0 for every class: at the start the norm is an unconditional one.
                nn.init.zeros_(embedding.weight)
            self.norm = ConditionalBatchNorm2d(num_features, *embeddings)
        self.conditional = num_classes > 0

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        normalised: Tensor = self.norm(x, labels) if self.conditional else self.norm(x)
        return normalised


class ProjectionHead(nn.Module):
    """Features (N, C) to logits (N,), fp32: a linear form, plus <embed(y), features> with classes.

    Miyato and Koyama (2018, arXiv 1802.05637), equation 5.
    """

    def __init__(self, linear: nn.Module, embedding: nn.Module | None) -> None:
        super().__init__()
        self.linear = linear
        self.embedding = embedding

    def forward(self, features: Tensor, labels: Tensor | None) -> Tensor:
        with without_autocast(features):
            # Features are sums over a map and the logit is what losses and penalties look at.
            values = at_least_fp32(features)
            logits: Tensor = self.linear(values).squeeze(1)
            if self.embedding is None:
                return logits
            assert labels is not None, "a class-conditional model needs labels"
            embedded: Tensor = self.embedding(labels)
            return logits + (embedded * values).sum(dim=1)
