"""Generator and encoder against a discriminator of pairs.

It tells (x, E(x)) from (G(z), z); at the optimum the two inverse each other (Donahue et al. 2017,
arXiv 1605.09782; Dumoulin et al. 2017, arXiv 1606.00704, whose encoder draws its latents, as here).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ganscale.config import Config
from ganscale.generation.latents import Draw
from ganscale.models import build_encoder, build_generator, build_joint_discriminator
from ganscale.models.autoencoder import sampled
from ganscale.training.step_inputs import StepInputs, StepVariant
from ganscale.training.steps.adversarial_schedules import adversarial_draws
from ganscale.training.steps.discriminator import Samples
from ganscale.training.steps.generator import generator_loss
from ganscale.training.steps.method import AdversarialMethod


class _Pairs(nn.Module):
    """Both ways at once: images to latents, latents to images."""

    def __init__(self, encoder: nn.Module, generator: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.generator = generator

    def forward(self, images: Tensor, noise: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(images)
        return sampled(mean, log_variance, noise), self.generator(z)


class Bigan(AdversarialMethod):
    """Encoder and generator learn as one, against a discriminator of pairs."""

    generator_phase = "generator and encoder"

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        spec = config.generator_spec
        return {
            "generator": build_generator(spec),
            "encoder": build_encoder(spec),
            "discriminator": build_joint_discriminator(spec),
        }

    def generator_module(self, networks: Mapping[str, nn.Module]) -> nn.Module:
        return _Pairs(networks["encoder"], networks["generator"])

    def draws(self, variant: StepVariant) -> dict[str, Draw]:
        latents = self.latent_draws(variant, "posterior", "z")
        # The encoder's part of the loss judges real pairs, whatever the objective is.
        return latents | adversarial_draws(self.config, variant, judges_real=True)

    def make_samples(self, inputs: StepInputs, variant: StepVariant) -> tuple[Samples, Samples]:
        """Pairs (x, E(x)) and (G(z), z)."""
        return self._make_pairs(self.generator.module, inputs, "D")

    def update_generator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of generator and encoder, who make each other's pairs alike."""
        # A fresh posterior sample and fresh latents: the pairs of the discriminator's phase belong
        # to a graph that was not recorded.
        real, fake = self._make_pairs(self.generator.ddp_module, inputs, "G")
        loss = generator_loss(self.discriminator, inputs, real, fake, real_learns=True)
        return self.minimise(inputs, loss)

    def _make_pairs(
        self, network: nn.Module, inputs: StepInputs, phase: str
    ) -> tuple[Samples, Samples]:
        real_images, z = inputs.batch.real_images, inputs.noise[f"{phase} z"]
        with self.precision.autocast():
            encoded, fake_images = network(real_images, inputs.noise[f"{phase} posterior"], z)
        # The condition of a pair is its latent. No labels: an unconditional encoder and generator.
        return Samples(real_images, encoded), Samples(fake_images, z)
