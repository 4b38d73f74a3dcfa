"""A generator against a discriminator (Goodfellow et al. 2014, arXiv 1406.2661)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ganscale.config import Config
from ganscale.generation.latents import Draw
from ganscale.models import build_discriminator, build_generator
from ganscale.training.step_inputs import StepInputs, StepVariant
from ganscale.training.steps.adversarial_schedules import adversarial_draws
from ganscale.training.steps.discriminator import Samples, real_and_fake
from ganscale.training.steps.generator import update_generator
from ganscale.training.steps.method import AdversarialMethod


class Gan(AdversarialMethod):
    """Both networks learn in turn, each on latents of its own."""

    _shared_fakes: Tensor | None = None
    """Of a step that updates both networks from one batch of fakes, between the two."""

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        spec = config.generator_spec
        return {"generator": build_generator(spec), "discriminator": build_discriminator(spec)}

    def draws(self, variant: StepVariant) -> dict[str, Draw]:
        latents = self.latent_draws(variant, "z")
        if self.config.training.shared_fakes:
            latents.pop("G z", None)
        return latents | adversarial_draws(self.config, variant)

    def make_samples(self, inputs: StepInputs, variant: StepVariant) -> tuple[Samples, Samples]:
        shared = variant.generator_turn and self.config.training.shared_fakes
        # Where the generator learns from these fakes too, DDP has to see the forward. Without
        # gradients there is nothing for it to average. Fakes take the labels of the real images, so
        # a class is as frequent on both sides.
        generator = self.generator.ddp_module if shared else self.generator.module
        with self.precision.autocast(), torch.set_grad_enabled(shared):
            fake_images = generator(inputs.noise["D z"], inputs.batch.labels)
        self._shared_fakes = fake_images if shared else None
        return real_and_fake(inputs.batch, fake_images)

    def update_generator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the generator against the updated discriminator.

        Its fakes are those that the discriminator has just learned from if `shared_fakes` says so,
        else of latents of its own.
        """
        fake_images, self._shared_fakes = self._shared_fakes, None
        return update_generator(self.generator, self.discriminator, inputs, fake_images)
