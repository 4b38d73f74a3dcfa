"""The discriminator's phase: forward, loss, penalties, backward, update.

Whatever makes fakes can be judged here: a generator, an encoder and a generator, pairs of images
and latents. The method decides which samples are shown; everything that changes from step to step
comes in `StepInputs`, and detached statistics on the device come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ganscale.config import Config
from ganscale.models.activations import middle_features
from ganscale.models.input_gradients import input_gradients_only
from ganscale.objectives.adversarial import OBJECTIVES, Objective
from ganscale.objectives.penalties import (
    PENALTIES,
    LogitsFn,
    PenaltyInputs,
    gradient_normalised,
    orthogonal_penalty,
)
from ganscale.training.adaptive import AdaController, LecamAnchors
from ganscale.training.collectives import global_mean, sum_over_ranks
from ganscale.training.optimized_model import OptimizedModel
from ganscale.training.precision import Precision
from ganscale.training.step_inputs import LocalBatch, StepInputs, StepVariant
from ganscale.training.steps.adversarial_schedules import augmentation_named
from ganscale.training.steps.statistics import summed
from ganscale.world import World


@dataclass(frozen=True)
class Samples:
    """Images that a discriminator judges, each with its condition."""

    images: Tensor
    """(n, C, H, W)"""
    condition: Tensor | None = None
    """Labels, int64 (n,), or latents, (n, z_dim); None for images alone."""


PartLoss = Callable[[StepInputs], tuple[Tensor, dict[str, Tensor]]]
"""The loss of some samples of a batch and its detached statistics, each () and a sum over them."""


def real_and_fake(batch: LocalBatch, fake_images: Tensor) -> tuple[Samples, Samples]:
    """Real images (n, C, H, W) and as many fakes, both with the labels of the real ones."""
    return Samples(batch.real_images, batch.labels), Samples(fake_images, batch.labels)


class DiscriminatorTrainer:
    """A discriminator that learns to tell real samples from fake ones."""

    def __init__(
        self, config: Config, network: nn.Module, precision: Precision, world: World
    ) -> None:
        self.config = config
        self.precision = precision
        self.world_size = world.world_size
        self.objective = OBJECTIVES[config.objective.name]
        self.model = OptimizedModel(
            network,
            config.optimizer,
            precision,
            world,
            lr=config.optimizer.lr_discriminator,
            clip_weights=config.optimizer.clip_weights,
        )
        self.augmentation = augmentation_named(config.augment.name)
        self.ada: AdaController | None = None
        if config.augment.target is not None:
            self.ada = AdaController(config.augment, world.torch_device)
        self.lecam = LecamAnchors(world.torch_device) if config.penalty.lecam else None

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of what `update` returns; a lazy penalty is missing in some steps."""
        names = ("loss_D", "real_logits", "fake_logits", "grad_norm_D")
        return (*names, *(f"penalty_{name}" for name in self.config.penalty.names))

    def update(
        self,
        inputs: StepInputs,
        variant: StepVariant,
        make_samples: Callable[[StepInputs], tuple[Samples, Samples]],
        *,
        extra_loss: PartLoss | None = None,
        loss_factor: float = 1.0,
    ) -> dict[str, Tensor]:
        """One update on real samples and as many fakes, which `make_samples` makes of inputs.

        It minimises `loss_factor` times the adversarial loss with its penalties, plus `extra_loss`.
        Returns statistics, each (); averaged over ranks they are those of the global batch.
        """
        # The orthogonal penalty depends on the weights alone, so it is the same on every rank and
        # needs no factor W / B; each micro-batch takes an equal part of it.
        orthogonal = self.config.penalty.orthogonal / len(inputs.micro_batches)

        def learn(part: StepInputs) -> dict[str, Tensor]:
            # Forward, losses and backward; DDP averages the gradients over ranks in the last one.
            extra, statistics = (0.0, {}) if extra_loss is None else extra_loss(part)
            with torch.no_grad():
                samples = make_samples(part)
            loss, own_statistics = self.loss(part, variant, *samples)
            weights = self.model.module
            self.model.backward(loss_factor * loss + extra + orthogonal_loss(weights, orthogonal))
            return statistics | own_statistics

        statistics = summed([learn(part) for part in self.model.micro_batches(inputs)])
        grad_norm = self.model.step(inputs.rates("D"))
        # Only now, so that this step was augmented and anchored by what earlier steps have seen.
        self._update_ada_and_lecam(inputs, statistics, statistics.pop("real_signs"))
        return statistics | {"grad_norm_D": grad_norm}

    def loss(
        self, inputs: StepInputs, variant: StepVariant, real: Samples, fake: Samples
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The adversarial loss with its penalties, (), and statistics, each ().

        All are sums over these samples, times W / B. The samples are constants here.
        """
        batch, schedules = inputs.batch, inputs.schedules
        penalties = {name: PENALTIES[name] for name in variant.penalties}
        # Fakes are detached: whatever made them learns in its own phase.
        # Both sides are leaves of this graph. They require a gradient only where a penalty of this
        # variant differentiates by them: otherwise every backward would go on through the first
        # layer and the augmentation for nothing.
        real_images = real.images.detach()
        real_images.requires_grad_(any(p.real_gradient for p in penalties.values()))
        # Generators may return half precision under autocast; a gradient by such images would be
        # rounded to it. Real images are fp32 already.
        fake_images = fake.images.detach().float()
        fake_images.requires_grad_(any(p.fake_gradient for p in penalties.values()))

        with self.precision.autocast():
            # Forward. Real and fake images go through one after the other: in one forward of both,
            # batch norm and the minibatch deviation would take their statistics over the two
            # together.
            real_logits_fn = self.logits_fn(inputs, "D real", real.condition, learns=True)
            fake_logits_fn = self.logits_fn(inputs, "D fake", fake.condition, learns=True)
            real_logits, fake_logits = real_logits_fn(real_images), fake_logits_fn(fake_images)

            # Loss. It is summed and multiplied by W / B instead of averaged: ranks may hold
            # different numbers of samples, and DDP's mean over ranks is then still the mean over
            # the global batch.
            centered = center_logits(self.objective, batch, real_logits, fake_logits)
            loss = self.objective.discriminator(*centered).sum() * batch.loss_weight

            # Penalties. They reuse the logits above where they can; those at other images (between
            # real and fake, perturbed, noisy) take further forwards.
            penalty_inputs = PenaltyInputs(
                real_logits_fn=real_logits_fn,
                fake_logits_fn=fake_logits_fn,
                real_images=real_images,
                fake_images=fake_images,
                real_logits=real_logits,
                fake_logits=fake_logits,
                noise=inputs.noise,
                inner_scale=self.precision.inner_scale,
                perturb=lambda images: flip_and_shift(images, inputs.noise["perturb"]),
                anchors=None if self.lecam is None else self.lecam.values,
            )
            # The backwards inside them are asked for gradients of images alone.
            with input_gradients_only():
                means = {
                    name: penalty.value(penalty_inputs).sum() * batch.loss_weight
                    for name, penalty in penalties.items()
                }
        # A penalty's weight is a tensor: a number would be a constant of a captured graph.
        total = loss
        for name, mean in means.items():
            total = total + schedules[f"penalty/{name}"] * mean
        real_values, fake_values = real_logits.detach().float(), fake_logits.detach().float()
        return total, {
            "loss_D": loss.detach(),
            "real_logits": real_values.sum() * batch.loss_weight,
            "fake_logits": fake_values.sum() * batch.loss_weight,
            "real_signs": real_values.sign().sum() * batch.loss_weight,
            **{f"penalty_{name}": mean.detach() for name, mean in means.items()},
        }

    def logits_fn(
        self, inputs: StepInputs, purpose: str, condition: Tensor | None, *, learns: bool
    ) -> LogitsFn:
        """The discriminator behind the augmentation, as a function of images alone.

        `purpose` names the random numbers of the augmentation. With `learns` a backward averages
        the discriminator's gradients over ranks; without, they are not wanted.
        """
        # A forward through the DDP wrapper prepares its reducer for a backward that reaches these
        # weights; the generator's backward does not, so it takes the bare module.
        network = self.model.ddp_module if learns else self.model.module

        def logits(images: Tensor) -> Tensor:
            values: Tensor = network(self.augment(inputs, purpose, images), condition)
            return values

        if not self.config.penalty.gradient_normalisation:
            return logits
        normalised = gradient_normalised(logits, self.precision.inner_scale)
        return input_gradients_only()(normalised)

    def augment(self, inputs: StepInputs, purpose: str, images: Tensor) -> Tensor:
        """Images as the discriminator sees them in this step."""
        if self.augmentation is None:
            return images
        p = inputs.schedules["augment_p"] if self.ada is None else self.ada.p
        return self.augmentation(images, self.augmentation.unpacked(inputs.noise[purpose]), p)

    def features(self, samples: Samples) -> Tensor:
        """Its features of images, (n, C, h, w), through which gradients reach the images."""
        with self.precision.autocast(), frozen(self.model.module):
            return middle_features(self.model.module, samples.images, samples.condition)

    def _update_ada_and_lecam(
        self, inputs: StepInputs, statistics: Mapping[str, Tensor], real_signs: Tensor
    ) -> None:
        """Update ADA and LeCam by this rank's part of the mean logits and signs, each ()."""
        # Without ADA and LeCam no step needs the global means; logged statistics are averaged over
        # ranks when a row is written.
        if self.ada is None and self.lecam is None:
            return
        # One tensor, so that ADA and LeCam cost a single all-reduce together.
        local = torch.stack([statistics["real_logits"], statistics["fake_logits"], real_signs])
        means = sum_over_ranks(local) / self.world_size
        # Logits that are not finite make gradients that are not, so this step is skipped, and it
        # must leave no trace here either. (A step that is skipped because finite logits have
        # gradients beyond fp16 counts: what was seen of the images holds.)
        is_finite = means.isfinite().all()
        if self.lecam is not None:
            # Moving towards where they are leaves the anchors in place.
            self.lecam.update(torch.where(is_finite, means[:2], self.lecam.values))
        if self.ada is not None:
            # The sign of inf is finite, so it is the mean logits that give such a step away.
            mean_sign = torch.where(is_finite, means[2], 0.0)
            self.ada.update(mean_sign, inputs.schedules["ada_p_step"])

    def extra_metrics(self, nimg: int) -> dict[str, float]:
        """What a row of metrics has of it besides its statistics; reads from the device."""
        if self.augmentation is None:
            return {}
        # A host read, which only a row of metrics can afford.
        p = self.config.augment.p.at(nimg) if self.ada is None else float(self.ada.p)
        return {"augment_p": p}

    def state_dict(self) -> dict[str, Any]:
        """What follows the logits; the model is saved with the other models."""
        parts = {"ada": self.ada, "lecam": self.lecam}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state in place."""
        for name, part in (("ada", self.ada), ("lecam", self.lecam)):
            if part is not None and name in state:  # it may be new to the run
                part.load_state_dict(state[name])


def center_logits(
    objective: Objective, batch: LocalBatch, real_logits: Tensor, fake_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Real and fake logits (n,), minus the other side's global mean where the objective asks."""
    # Relativistic average losses compare with E of the other side (arXiv 1807.00734, equations 10
    # and 11). The mean is global and carries its gradient over ranks, or W workers would minimise
    # another loss than one worker does.
    if not objective.centred:
        return real_logits, fake_logits
    real, fake = real_logits.float(), fake_logits.float()
    real_centered = real - global_mean(fake, batch.loss_weight)
    return real_centered, fake - global_mean(real, batch.loss_weight)


def orthogonal_loss(module: nn.Module, weight: float) -> Tensor | float:
    """The weighted orthogonal penalty of a network, (); 0 where the weight is 0."""
    return weight * orthogonal_penalty(module) if weight else 0.0


def flip_and_shift(images: Tensor, noise: Tensor) -> Tensor:
    """Images (n, C, H, W), each flipped and shifted as its row of `noise` says."""
    augmentation = augmentation_named("flip_translate")
    return augmentation(images, augmentation.unpacked(noise), 1.0)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module asks for a gradient while a forward is recorded."""
    # Only the recording counts: a graph that was recorded with frozen weights computes no gradients
    # of them in its backward, even after the block has ended. Activations still carry gradients to
    # the images.
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
