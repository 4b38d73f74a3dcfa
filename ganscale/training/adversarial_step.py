"""One phase of each player: forward, objective, penalties, scaled backward.

Detached device tensors come out. No logging, no rank, no host sync; the loop decides when, the
player how. A rank's share of the global batch may be any size: losses are summed and multiplied by
`weight` = W / B, so that the gradient that DDP averages over W ranks is that of the mean over the
global batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ganscale.augment.pipeline import AUGMENTATIONS, Augmentation
from ganscale.generation.latents import StepRandomness
from ganscale.objectives.adversarial import Objective
from ganscale.objectives.penalties import (
    PENALTIES,
    Judge,
    Played,
    gradient_normalised,
    orthogonal_penalty,
)
from ganscale.training.distribute import global_mean, kth_largest
from ganscale.training.players import Player
from ganscale.training.precision import Precision

__all__ = ["PhaseResult", "Rules", "Share", "discriminator_phase", "generator_phase"]

_PERTURBATION = Augmentation(AUGMENTATIONS["flip_translate"])


@dataclass(frozen=True)
class Rules:
    """What the players minimise at this position, and in which arithmetic."""

    objective: Objective
    precision: Precision
    penalties: Mapping[str, float]
    """Weights by name, of those of `PENALTIES` that are on in this step."""
    orthogonal: float = 0.0
    """Weight of the orthogonal penalty, on both players."""
    gradient_normalisation: bool = False
    top_k: float = 1.0
    """Part of the global batch that the generator learns from."""
    augmentation: Augmentation | None = None
    augment_p: Tensor | float = 0.0
    lecam_anchors: Tensor | None = None
    """Running means of real and fake logits, (2,)."""


@dataclass(frozen=True)
class Share:
    """A rank's part of one global batch."""

    real_images: Tensor
    """(n, C, H, W) in [-1, 1]"""
    labels: Tensor | None
    """int64 (n,), of real images and of the fakes beside them; None without classes."""
    random: StepRandomness
    z_dim: int
    weight: float
    """W / B."""


@dataclass(frozen=True)
class PhaseResult:
    """What a phase saw on this rank, weighted: averaged over ranks it is the global mean; ()."""

    loss: Tensor
    """Without penalties."""
    fake_logits: Tensor
    real_logits: Tensor | None = None
    real_signs: Tensor | None = None
    penalties: Mapping[str, Tensor] = field(default_factory=dict)
    """By name, before their weights."""


def discriminator_phase(
    generator: Player, discriminator: Player, rules: Rules, share: Share
) -> PhaseResult:
    """Gradients of the discriminator on the share's real images and as many fakes."""
    z = share.random.normal("D z", share.z_dim)
    wanted = [PENALTIES[name] for name in rules.penalties]
    real_images = share.real_images.detach().requires_grad_(any(p.real_gradient for p in wanted))
    with rules.precision.autocast():
        with torch.no_grad():
            fake_images = generator.module(z, share.labels).float()
        fake_images.requires_grad_(any(p.fake_gradient for p in wanted))
        judge_real = _judge(discriminator.network, rules, share, "D real")
        judge_fake = _judge(discriminator.network, rules, share, "D fake")
        real_logits, fake_logits = judge_real(real_images), judge_fake(fake_images)
        compared = _compared(rules, share, real_logits, fake_logits)
        loss = rules.objective.discriminator(*compared)
        played = Played(
            judge_real=judge_real,
            judge_fake=judge_fake,
            real_images=real_images,
            fake_images=fake_images,
            real_logits=real_logits,
            fake_logits=fake_logits,
            random=share.random,
            inner_scale=rules.precision.inner_scale,
            perturb=partial(_augment, _PERTURBATION, 1.0, share, "perturb"),
            anchors=rules.lecam_anchors,
        )
        penalties = {name: PENALTIES[name].value(played).sum() for name in rules.penalties}
    objective = loss.sum() * share.weight
    total = objective
    for name, value in penalties.items():
        total = total + rules.penalties[name] * share.weight * value
    discriminator.backward(total + _orthogonal(discriminator, rules))
    return PhaseResult(
        loss=objective.detach(),
        fake_logits=_weighted(fake_logits, share.weight),
        real_logits=_weighted(real_logits, share.weight),
        real_signs=_weighted(real_logits.sign(), share.weight),
        penalties={name: _weighted(value, share.weight) for name, value in penalties.items()},
    )


def generator_phase(
    generator: Player, discriminator: Player, rules: Rules, share: Share
) -> PhaseResult:
    """Gradients of the generator on the share's places; the discriminator's stay untouched.

    The real images are looked at by relativistic objectives alone.
    """
    z = share.random.normal("G z", share.z_dim)
    real_logits = None
    with rules.precision.autocast(), _frozen(discriminator.module):
        if rules.objective.generator_sees_real:
            judge_real = _judge(discriminator.module, rules, share, "G real")
            real_logits = judge_real(share.real_images).detach()
        fake_images = generator.network(z, share.labels)
        fake_logits = _judge(discriminator.module, rules, share, "G fake")(fake_images)
        if real_logits is not None:
            real_logits, fake_logits = _compared(rules, share, real_logits, fake_logits)
        loss = rules.objective.generator(real_logits, fake_logits)
    objective = (loss * _chosen(rules, share, fake_logits)).sum() * share.weight
    generator.backward(objective + _orthogonal(generator, rules))
    return PhaseResult(loss=objective.detach(), fake_logits=_weighted(fake_logits, share.weight))


def _judge(discriminator: nn.Module, rules: Rules, share: Share, purpose: str) -> Judge:
    """The discriminator behind the augmentation, with the share's labels."""

    def judge(images: Tensor) -> Tensor:
        if rules.augmentation is not None:
            images = _augment(rules.augmentation, rules.augment_p, share, purpose, images)
        logits: Tensor = discriminator(images, share.labels)
        return logits

    if rules.gradient_normalisation:
        return gradient_normalised(judge, rules.precision.inner_scale)
    return judge


def _augment(
    augmentation: Augmentation, p: Tensor | float, share: Share, purpose: str, images: Tensor
) -> Tensor:
    return augmentation(images, share.random.rows_of(augmentation.draw, purpose), p)


def _compared(
    rules: Rules, share: Share, real_logits: Tensor, fake_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """The logits as the objective wants them: as they are, or minus the other side's mean."""
    if not rules.objective.centred:
        return real_logits, fake_logits
    real, fake = real_logits.float(), fake_logits.float()
    return real - global_mean(fake, share.weight), fake - global_mean(real, share.weight)


def _chosen(rules: Rules, share: Share, fake_logits: Tensor) -> Tensor | float:
    """Weights of the generator's samples: the k best of the global batch count, and B / k times.

    Sinha et al. (2020, arXiv 2002.06224).
    """
    size = share.random.batch_size
    k = max(1, round(rules.top_k * size))
    if k == size:
        return 1.0
    logits = fake_logits.detach().float()
    table = share.random.table(logits, fill=-torch.inf)
    return (logits >= kth_largest(table, k)) * (size / k)


def _orthogonal(player: Player, rules: Rules) -> Tensor | float:
    if not rules.orthogonal:
        return 0.0
    return rules.orthogonal * orthogonal_penalty(dict(player.module.named_parameters()))


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module asks for a gradient while a forward is recorded."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def _weighted(values: Tensor, weight: float) -> Tensor:
    return values.detach().float().sum() * weight
