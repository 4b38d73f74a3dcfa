"""Generator and encoder against a discriminator of pairs.

It tells (x, E(x)) from (G(z), z); at the optimum the two inverse each other (Donahue et al. 2017,
arXiv 1605.09782; Dumoulin et al. 2017, arXiv 1606.00704, whose encoder draws its latents, as here).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ganscale.config import Config
from ganscale.generation.latents import Draw
from ganscale.models import build_encoder, build_generator, build_joint_discriminator
from ganscale.models.autoencoder import sampled
from ganscale.training.inputs import StepInputs, StepVariant
from ganscale.training.optimized_model import OptimizedModel
from ganscale.training.precision import Precision
from ganscale.training.steps.adversarial_schedules import adversarial_draws
from ganscale.training.steps.discriminator import DiscriminatorTrainer, Samples, orthogonal_loss
from ganscale.training.steps.generator import generator_loss
from ganscale.training.steps.method import PhaseUpdate, TrainingMethod
from ganscale.world import World

__all__ = ["Bigan"]


class _Pairs(nn.Module):
    """Both ways at once: images to latents, latents to images."""

    def __init__(self, encoder: nn.Module, generator: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.generator = generator

    def forward(self, images: Tensor, noise: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(images)
        return sampled(mean, log_variance, noise), self.generator(z)


class Bigan(TrainingMethod):
    """Encoder and generator learn as one, against a discriminator of pairs."""

    discriminator: DiscriminatorTrainer

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        super().__init__(config, precision)
        # One module with one forward: DDP takes the parameters that its latest forward did not
        # reach for unused, which would be the encoder's if the two were called one after the other.
        pairs = _Pairs(networks["encoder"], networks["generator"])
        self.pairs = OptimizedModel(pairs, config.optimizer, precision, world)
        self.discriminator = DiscriminatorTrainer(
            config, networks["discriminator"], precision, world
        )
        self.models = {"G": self.pairs, "D": self.discriminator.model}
        self.statistics = (*self.discriminator.statistics, "loss_G", "grad_norm_G")

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        spec = config.generator_spec
        return {
            "generator": build_generator(spec),
            "encoder": build_encoder(spec),
            "discriminator": build_joint_discriminator(spec),
        }

    def draws(self, variant: StepVariant) -> dict[str, Draw]:
        latents = self.latent_draws(variant, "posterior", "z")
        # The encoder's part of the loss judges real pairs, whatever the objective is.
        return latents | adversarial_draws(self.config, variant, judges_real=True)

    def phases(self, variant: StepVariant) -> list[PhaseUpdate]:
        phases: list[PhaseUpdate] = [("discriminator", self.update_discriminator)]
        if variant.generator_turn:
            phases.append(("generator and encoder", self.update_pairs))
        return phases

    def update_discriminator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the discriminator on pairs (x, E(x)) and (G(z), z)."""

        @torch.no_grad()
        def make_samples(part: StepInputs) -> tuple[Samples, Samples]:
            return self._make_pairs(self.pairs.module, part, "D")

        return self.discriminator.update(inputs, variant, make_samples)

    def update_pairs(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of generator and encoder, who make each other's pairs alike."""
        # A fresh posterior sample and fresh latents: the pairs of the discriminator's phase belong
        # to a graph that was not recorded.
        real, fake = self._make_pairs(self.pairs.ddp_module, inputs, "G")
        loss = generator_loss(self.discriminator, inputs, real, fake, real_learns=True)
        orthogonal = orthogonal_loss(self.pairs.module, self.config.penalty.orthogonal)
        self.pairs.backward(loss + orthogonal)
        return {"loss_G": loss.detach(), "grad_norm_G": self.pairs.step(inputs.rates("G"))}

    def _make_pairs(
        self, network: nn.Module, inputs: StepInputs, phase: str
    ) -> tuple[Samples, Samples]:
        real_images, z = inputs.batch.real_images, inputs.noise[f"{phase} z"]
        with self.precision.autocast():
            encoded, fake_images = network(real_images, inputs.noise[f"{phase} posterior"], z)
        # The condition of a pair is its latent. No labels: an unconditional encoder and generator.
        return Samples(real_images, encoded), Samples(fake_images, z)
