"""Which inputs a step against a discriminator has: its penalties, random numbers and schedules.

All of it is decided on the host and follows from the configuration and the position.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, overload

import torch
from torch import Tensor

from ganscale.augment.pipeline import AUGMENTATIONS, Augmentation
from ganscale.config import Config
from ganscale.generation.latents import Draw, normal, uniform
from ganscale.objectives.adversarial import OBJECTIVES
from ganscale.objectives.penalties import PENALTIES
from ganscale.training.adaptive import ada_p_step
from ganscale.training.step_inputs import StepContext, StepVariant, scalar


def penalty_weights(config: Config, *, nimg: int, step: int) -> dict[str, float]:
    """The penalties on logits that are on in a step, and their weights.

    Lazy ones are on at every `interval`-th step only, with `interval` times their weight.
    """
    penalty = config.penalty
    # Lazy regularisation (Karras et al. 2020, arXiv 1912.04958, section 3.1). Multiplying by the
    # interval keeps the mean strength. StyleGAN2 takes the penalty in an update of its own and
    # corrects Adam's rates for that; here it is added to the loss of the same update, so nothing
    # has to be corrected.
    lazy = penalty.interval if step % penalty.interval == 0 else 0
    suffix = "_finite_difference" if penalty.form == "finite_difference" else ""
    weights = {
        f"r1{suffix}": lazy * penalty.r1.at(nimg),
        f"r2{suffix}": lazy * penalty.r2.at(nimg),
        "wgan_gp": lazy * penalty.wgan_gp,
        "dragan": lazy * penalty.dragan,
        # These two take no gradient of a gradient, so there is nothing to be saved by laziness.
        "consistency": penalty.consistency,
        "lecam": penalty.lecam,
    }
    # A weight of 0 leaves the penalty out of the step altogether: multiplying it by 0 would cost as
    # much, and 0 times a value that is not finite is not 0.
    return {name: weight for name, weight in weights.items() if weight}


def adversarial_draws(
    config: Config, variant: StepVariant, *, judges_real: bool = False
) -> dict[str, Draw]:
    """Random numbers that the discriminator's update and the generator's loss need, by purpose.

    `judges_real` says that the generator's phase judges real images whatever the objective is.
    """
    draws: dict[str, Draw] = {}
    model = config.model
    for penalty in (PENALTIES[name] for name in variant.penalties):
        # Drawn for every penalty of the variant alone: the purpose is part of the seed, so a
        # penalty that is off changes no number of another.
        if penalty.pixel_noise:
            draws[penalty.pixel_noise] = normal(
                model.img_channels, model.resolution, model.resolution
            )
        if penalty.image_noise:
            draws[penalty.image_noise] = uniform(1, 1, 1)
    if "consistency" in variant.penalties:
        draws["perturb"] = augmentation_draw("flip_translate")
    if config.augment.name != "none":
        # Each batch that a discriminator sees is augmented by rows of its own.
        purposes = ["D real", "D fake"]
        if variant.generator_turn:
            purposes.append("G fake")
            if judges_real or OBJECTIVES[config.objective.name].generator_sees_real:
                purposes.append("G real")
        draws |= dict.fromkeys(purposes, augmentation_draw(config.augment.name))
    return draws


def adversarial_schedules(config: Config, context: StepContext) -> dict[str, Tensor]:
    """What the two phases need besides learning rates, on the host, each ()."""
    nimg, size = context.nimg, context.batch_size
    weights = penalty_weights(config, nimg=nimg, step=context.step)
    values = {f"penalty/{name}": scalar(weight) for name, weight in weights.items()}
    if config.augment.target is not None:
        # p itself is state on the device, since it follows logits; how far it may move is known
        # here.
        values["ada_p_step"] = scalar(ada_p_step(config.augment, context.step, size))
    elif config.augment.name != "none":
        values["augment_p"] = scalar(config.augment.p.at(nimg))
    if uses_top_k(config):
        # k is an int64, which an index on the device is made of; its scale is a separate input, so
        # that the step divides nothing on the host.
        k = max(1, round(config.objective.top_k.at(nimg) * size))
        values["top_k"] = scalar(k, torch.int64)
        values["top_k_scale"] = scalar(size / k)
    return values


def uses_top_k(config: Config) -> bool:
    """Whether the generator learns from a part of the batch only, now or later."""
    top_k = config.objective.top_k
    return (top_k.start, top_k.end) != (1, 1)


@overload
def augmentation_named(name: Literal["flip_translate"]) -> Augmentation: ...
@overload
def augmentation_named(name: str) -> Augmentation | None: ...
def augmentation_named(name: str) -> Augmentation | None:
    """The augmentation of this name; None for "none"."""
    return None if name == "none" else _augmentation(name)


# An augmentation is a table of names and columns without tensors, so one object serves all.
@cache
def _augmentation(name: str) -> Augmentation:
    return Augmentation(AUGMENTATIONS[name])


def augmentation_draw(name: str) -> Draw:
    """Draws the random numbers of an augmentation as rows of a tensor."""
    augmentation = _augmentation(name)
    return lambda batch_size, generator: augmentation.draw(batch_size, generator).packed()
