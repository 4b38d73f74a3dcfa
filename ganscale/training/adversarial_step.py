"""The game against a discriminator, from either side: its own phase, and the loss of who fools it.

Whatever makes fakes can be judged here: a generator, an encoder and a generator, pairs of images
and latents. Detached device tensors come out, and the fooling side's loss to be differentiated. No
logging, no rank, no host sync; the method decides what is shown, the player how it learns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ganscale.augment.pipeline import AUGMENTATIONS, Augmentation
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
from ganscale.training.share import Share

__all__ = [
    "PhaseResult",
    "Rules",
    "Shown",
    "augmented",
    "discriminator_phase",
    "fooling_loss",
    "frozen",
    "orthogonal",
]

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
class Shown:
    """Images that a discriminator is shown, and what beside each of them."""

    images: Tensor
    """(n, C, H, W)"""
    beside: Tensor | None = None
    """Labels, int64 (n,), or latents, (n, z_dim); None for images alone."""


@dataclass(frozen=True)
class PhaseResult:
    """What the discriminator saw on this rank, each (): the mean over ranks is the global one."""

    loss: Tensor
    """Without penalties."""
    real_logits: Tensor
    fake_logits: Tensor
    real_signs: Tensor
    penalties: Mapping[str, Tensor] = field(default_factory=dict)
    """By name, before their weights."""


def discriminator_phase(
    discriminator: Player,
    rules: Rules,
    share: Share,
    real: Shown,
    fake: Shown,
    *,
    also: Tensor | float = 0.0,
    game_weight: float = 1.0,
) -> PhaseResult:
    """Gradients of the discriminator on real images and as many fakes, which are constants.

    `also` is what else it minimises, weighted like a share's loss, beside `game_weight` times the
    game with its penalties.
    """
    wanted = [PENALTIES[name] for name in rules.penalties]
    real_images = real.images.detach().requires_grad_(any(p.real_gradient for p in wanted))
    fake_images = fake.images.detach().float()
    fake_images.requires_grad_(any(p.fake_gradient for p in wanted))
    with rules.precision.autocast():
        judge_real = _judge(discriminator.network, rules, share, "D real", real.beside)
        judge_fake = _judge(discriminator.network, rules, share, "D fake", fake.beside)
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
    discriminator.backward(game_weight * total + also + orthogonal(discriminator, rules))
    return PhaseResult(
        loss=objective.detach(),
        fake_logits=_weighted(fake_logits, share.weight),
        real_logits=_weighted(real_logits, share.weight),
        real_signs=_weighted(real_logits.sign(), share.weight),
        penalties={name: _weighted(value, share.weight) for name, value in penalties.items()},
    )


def fooling_loss(
    discriminator: Player,
    rules: Rules,
    share: Share,
    real: Shown,
    fake: Shown,
    *,
    real_learns: bool = False,
) -> Tensor:
    """The loss of whoever made the fakes, (); the discriminator's gradients stay untouched.

    Averaged over ranks it is the mean over the global batch. With `real_learns`, what is beside the
    real images learns too, to be taken for beside fakes. Otherwise the real ones are looked at by
    relativistic objectives alone.
    """
    real_logits = None
    with rules.precision.autocast(), frozen(discriminator.module):
        if rules.objective.generator_sees_real or real_learns:
            judge_real = _judge(discriminator.module, rules, share, "G real", real.beside)
            real_logits = judge_real(real.images)
            real_logits = real_logits if real_learns else real_logits.detach()
        fake_logits = _judge(discriminator.module, rules, share, "G fake", fake.beside)(fake.images)
        if real_logits is not None:
            real_logits, fake_logits = _compared(rules, share, real_logits, fake_logits)
        loss = rules.objective.generator(real_logits, fake_logits)
        if real_learns and real_logits is not None and not rules.objective.generator_sees_real:
            loss = loss + rules.objective.generator(None, -real_logits)
        return (loss * _chosen(rules, share, fake_logits)).sum() * share.weight


def orthogonal(player: Player, rules: Rules) -> Tensor | float:
    """The orthogonal penalty of a player with its weight; 0 where there is none."""
    if not rules.orthogonal:
        return 0.0
    return rules.orthogonal * orthogonal_penalty(dict(player.module.named_parameters()))


def augmented(rules: Rules, share: Share, purpose: str, images: Tensor) -> Tensor:
    """Images as the discriminator sees them in this step; random numbers are by purpose."""
    if rules.augmentation is None:
        return images
    return _augment(rules.augmentation, rules.augment_p, share, purpose, images)


def _judge(
    discriminator: nn.Module, rules: Rules, share: Share, purpose: str, beside: Tensor | None
) -> Judge:
    """The discriminator behind the augmentation, with what is shown beside the images."""

    def judge(images: Tensor) -> Tensor:
        logits: Tensor = discriminator(augmented(rules, share, purpose, images), beside)
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


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module asks for a gradient while a forward is recorded."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def _weighted(values: Tensor, weight: float) -> Tensor:
    return values.detach().float().sum() * weight
