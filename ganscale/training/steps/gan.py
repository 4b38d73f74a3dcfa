"""A generator against a discriminator (Goodfellow et al. 2014, arXiv 1406.2661)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ganscale.config import Config
from ganscale.generation.latents import Draw
from ganscale.models import build_discriminator, build_generator
from ganscale.training.inputs import StepInputs, StepVariant
from ganscale.training.optimized_model import OptimizedModel
from ganscale.training.precision import Precision
from ganscale.training.steps.adversarial_schedules import adversarial_draws
from ganscale.training.steps.discriminator import DiscriminatorTrainer, Samples, real_and_fake
from ganscale.training.steps.generator import update_generator
from ganscale.training.steps.method import PhaseUpdate, TrainingMethod
from ganscale.world import World

__all__ = ["Gan"]


class Gan(TrainingMethod):
    """Both networks learn in turn, each on latents of its own."""

    discriminator: DiscriminatorTrainer

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        super().__init__(config, precision)
        self.generator = OptimizedModel(networks["generator"], config.optimizer, precision, world)
        self.discriminator = DiscriminatorTrainer(
            config, networks["discriminator"], precision, world
        )
        self.models = {"G": self.generator, "D": self.discriminator.model}
        self.statistics = (*self.discriminator.statistics, "loss_G", "grad_norm_G")
        # Of a step in which both networks are updated from one batch of fakes, between the two.
        self._shared_fakes: Tensor | None = None

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        spec = config.generator_spec
        return {"generator": build_generator(spec), "discriminator": build_discriminator(spec)}

    def draws(self, variant: StepVariant) -> dict[str, Draw]:
        latents = self.latent_draws(variant, "z")
        if self.config.training.shared_fakes:
            latents.pop("G z", None)
        return latents | adversarial_draws(self.config, variant)

    def phases(self, variant: StepVariant) -> list[PhaseUpdate]:
        phases: list[PhaseUpdate] = [("discriminator", self.update_discriminator)]
        if variant.generator_turn:
            phases.append(("generator", self.update_generator))
        return phases

    def update_discriminator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the discriminator; the generator's comes after it."""
        shared = variant.generator_turn and self.config.training.shared_fakes
        # Where the generator learns from these fakes too, DDP has to see the forward. Without
        # gradients there is nothing for it to average. Fakes take the labels of the real images, so
        # a class is as frequent on both sides.
        generator = self.generator.ddp_module if shared else self.generator.module

        def make_samples(part: StepInputs) -> tuple[Samples, Samples]:
            with self.precision.autocast(), torch.set_grad_enabled(shared):
                fake_images = generator(part.noise["D z"], part.batch.labels)
            self._shared_fakes = fake_images if shared else None
            return real_and_fake(part.batch, fake_images)

        return self.discriminator.update(inputs, variant, make_samples)

    def update_generator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the generator against the updated discriminator.

        Its fakes are those that the discriminator has just learned from if `shared_fakes` says so,
        else of latents of its own.
        """
        fake_images, self._shared_fakes = self._shared_fakes, None
        return update_generator(self.generator, self.discriminator, inputs, fake_images)
