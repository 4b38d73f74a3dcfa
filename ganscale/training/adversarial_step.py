"""One phase of each player: forward, objective, scaled backward. Detached device tensors come out.

No logging, no rank, no host sync; the loop decides when, the player how. A rank's share of the
global batch may be any size: losses are summed and multiplied by `weight` = W / B, so that the
gradient that DDP averages over W ranks is that of the mean over the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ganscale.objectives.adversarial import Objective
from ganscale.training.players import Player
from ganscale.training.precision import Precision

__all__ = ["PhaseResult", "discriminator_phase", "generator_phase"]


@dataclass(frozen=True)
class PhaseResult:
    """What a phase saw on this rank, weighted: averaged over ranks it is the global mean; ()."""

    loss: Tensor
    real_logits: Tensor | None
    fake_logits: Tensor


def discriminator_phase(
    generator: Player,
    discriminator: Player,
    objective: Objective,
    precision: Precision,
    *,
    real_images: Tensor,
    z: Tensor,
    weight: float,
) -> PhaseResult:
    """Gradients of the discriminator on real images (n, C, H, W) in [-1, 1] and latents (n, z)."""
    with precision.autocast():
        with torch.no_grad():
            fake_images = generator.module(z)
        real_logits = discriminator.network(real_images)
        fake_logits = discriminator.network(fake_images)
    loss = objective.discriminator(real_logits, fake_logits).sum() * weight
    discriminator.backward(loss)
    return PhaseResult(
        loss=loss.detach(),
        real_logits=_weighted(real_logits, weight),
        fake_logits=_weighted(fake_logits, weight),
    )


def generator_phase(
    generator: Player,
    discriminator: Player,
    objective: Objective,
    precision: Precision,
    *,
    real_images: Tensor,
    z: Tensor,
    weight: float,
) -> PhaseResult:
    """Gradients of the generator on latents (n, z); the discriminator's stay untouched.

    The real images are looked at by relativistic objectives alone.
    """
    real_logits = None
    with precision.autocast(), _frozen(discriminator.module):
        if objective.generator_sees_real:
            real_logits = discriminator.module(real_images)
        fake_logits = discriminator.module(generator.network(z))
    loss = objective.generator(real_logits, fake_logits).sum() * weight
    generator.backward(loss)
    return PhaseResult(loss.detach(), None, _weighted(fake_logits, weight))


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module asks for a gradient while a forward is recorded."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def _weighted(logits: Tensor, weight: float) -> Tensor:
    return logits.detach().float().sum() * weight
