"""An encoder for a generator that is trained already (Zhu et al. 2020, arXiv 2004.00049).

The generator, which stays as it is, is to reconstruct what it encodes: in pixels, in the
features of a discriminator, and so that the discriminator takes it for real (equations 2 and 3;
features of the discriminator in place of an ImageNet network's, which not everybody has).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ganscale.config import Config, EncoderMethod
from ganscale.errors import ConfigError
from ganscale.generation.latents import Draw
from ganscale.generation.snapshot import load_generator
from ganscale.models import build_discriminator, build_encoder
from ganscale.training.inputs import StepInputs, StepVariant
from ganscale.training.optimized_model import OptimizedModel
from ganscale.training.precision import Precision
from ganscale.training.steps.adversarial_schedules import adversarial_draws
from ganscale.training.steps.discriminator import (
    DiscriminatorTrainer,
    Samples,
    orthogonal_loss,
    real_and_fake,
)
from ganscale.training.steps.generator import generator_loss
from ganscale.training.steps.likelihood import reconstruction_likelihood
from ganscale.training.steps.method import PhaseUpdate, TrainingMethod
from ganscale.world import World

__all__ = ["InDomainEncoder"]


class _Inverse(nn.Module):
    """Images through the encoder and a generator that does not learn."""

    def __init__(self, encoder: nn.Module, generator: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        # Evaluation mode, so that batch norm uses the statistics it was trained to, and no weight
        # changes; gradients still pass through to the latents.
        self.generator = generator.eval().requires_grad_(False)

    def forward(self, images: Tensor, labels: Tensor | None) -> Tensor:
        # The mean alone: an inverse is to be one latent, not a distribution.
        mean, _ = self.encoder(images)
        made: Tensor = self.generator(mean, labels)
        return made


class InDomainEncoder(TrainingMethod):
    """The encoder learns, against a discriminator of its reconstructions."""

    discriminator: DiscriminatorTrainer

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        assert isinstance(config.method, EncoderMethod)
        super().__init__(config, precision)
        self.adversarial = config.method.adversarial
        inverse = _Inverse(networks["encoder"], networks["generator"])
        self.inverse = OptimizedModel(inverse, config.optimizer, precision, world)
        self.discriminator = DiscriminatorTrainer(
            config, networks["discriminator"], precision, world
        )
        self.models = {"E": self.inverse, "D": self.discriminator.model}
        own = ("loss_E", "grad_norm_E", "adversarial_loss", "squared_error")
        self.statistics = (*self.discriminator.statistics, *own)

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        assert isinstance(config.method, EncoderMethod)
        spec = config.generator_spec
        trained = load_generator(config.method.generator)
        theirs = trained.info["model"]
        if theirs != spec:
            # The message lists every option that differs, ready to be copied to the command line.
            other = [
                f"model.{name}={theirs[name]}" for name in theirs if theirs[name] != spec.get(name)
            ]
            raise ConfigError(
                f"the generator in {config.method.generator} is another model: "
                f"set {' '.join(other)}"
            )
        return {
            "generator": trained.model,
            "encoder": build_encoder(spec),
            "discriminator": build_discriminator(spec),
        }

    def draws(self, variant: StepVariant) -> dict[str, Draw]:
        return adversarial_draws(self.config, variant)

    def phases(self, variant: StepVariant) -> list[PhaseUpdate]:
        phases: list[PhaseUpdate] = [("discriminator", self.update_discriminator)]
        if variant.generator_turn:
            phases.append(("encoder", self.update_encoder))
        return phases

    def update_discriminator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the discriminator on reconstructions."""

        @torch.no_grad()
        def make_samples(part: StepInputs) -> tuple[Samples, Samples]:
            with self.precision.autocast():
                fake_images = self.inverse.module(part.batch.real_images, part.batch.labels)
            return real_and_fake(part.batch, fake_images)

        return self.discriminator.update(inputs, variant, make_samples)

    def update_encoder(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the encoder: likelihoods of pixels and features, adversarial loss."""
        batch = inputs.batch
        with self.precision.autocast():
            fake_images = self.inverse.ddp_module(batch.real_images, batch.labels)
        real, fake = real_and_fake(batch, fake_images)
        # Equation 2 of the paper weighs features against pixels by a constant. Here each has the
        # variance that maximises its likelihood, so neither has to be tuned.
        pixels = reconstruction_likelihood(batch, real.images, fake_images)
        # A target, and the discriminator is a fixed measure in this phase.
        real_features = self.discriminator.features(real).detach()
        features = reconstruction_likelihood(
            batch, real_features, self.discriminator.features(fake)
        )
        adversarial = generator_loss(self.discriminator, inputs, real, fake)
        loss = pixels.nll + features.nll + self.adversarial * adversarial
        orthogonal = orthogonal_loss(self.inverse.module, self.config.penalty.orthogonal)
        self.inverse.backward(loss + orthogonal)
        return {
            "loss_E": loss.detach(),
            "adversarial_loss": adversarial.detach(),
            "squared_error": pixels.squared_error.detach(),
            "grad_norm_E": self.inverse.step(inputs.rates("E")),
        }
