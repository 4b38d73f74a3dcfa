"""An autoencoder trained against a discriminator (Larsen et al. 2016, arXiv 1512.09300).

The likelihood is that of the image's features in the discriminator (equation 7), not of its pixels.
The decoder also minimises the adversarial loss, on images of latents of which half are encoded and
half drawn from the prior. As in algorithm 1 of the paper the encoder gets no gradient of the
adversarial loss. The paper's weight gamma between the decoder's terms is here that of the
adversarial one, which is the same under Adam.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ganscale.config import Config, VaeGanMethod
from ganscale.generation.latents import Draw, uniform
from ganscale.models import build_discriminator, build_encoder, build_generator
from ganscale.models.autoencoder import Autoencoder, Encoded
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
from ganscale.training.steps.likelihood import posterior_kl, reconstruction_likelihood
from ganscale.training.steps.method import PhaseUpdate, TrainingMethod
from ganscale.world import World

__all__ = ["VaeGan"]


class VaeGan(TrainingMethod):
    """Encoder and generator learn as one, against the discriminator."""

    discriminator: DiscriminatorTrainer

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        assert isinstance(config.method, VaeGanMethod)
        super().__init__(config, precision)
        self.settings = config.method
        autoencoder = Autoencoder(networks["encoder"], networks["generator"])
        self.autoencoder = OptimizedModel(autoencoder, config.optimizer, precision, world)
        self.discriminator = DiscriminatorTrainer(
            config, networks["discriminator"], precision, world
        )
        self.models = {"G": self.autoencoder, "D": self.discriminator.model}
        own = ("loss_G", "grad_norm_G", "adversarial_loss", "squared_error", "kl")
        self.statistics = (*self.discriminator.statistics, *own)

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        spec = config.generator_spec
        return {
            "generator": build_generator(spec),
            "encoder": build_encoder(spec),
            "discriminator": build_discriminator(spec),
        }

    def draws(self, variant: StepVariant) -> dict[str, Draw]:
        latents = self.latent_draws(variant, "posterior", "z")
        draws = latents | adversarial_draws(self.config, variant)
        for phase in ("D", "G") if variant.generator_turn else ("D",):
            # A number below one half takes a row from the prior: fakes are of both kinds that
            # algorithm 1 of the paper shows the discriminator.
            draws[f"{phase} from prior"] = uniform(1)
        return draws

    def phases(self, variant: StepVariant) -> list[PhaseUpdate]:
        phases: list[PhaseUpdate] = [("discriminator", self.update_discriminator)]
        if variant.generator_turn:
            phases.append(("autoencoder", self.update_autoencoder))
        return phases

    def update_discriminator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the discriminator on images decoded from both kinds of latents."""

        @torch.no_grad()
        def make_samples(part: StepInputs) -> tuple[Samples, Samples]:
            fake_images = self._encode(self.autoencoder.module, part, "D").fakes
            assert fake_images is not None
            return real_and_fake(part.batch, fake_images)

        return self.discriminator.update(inputs, variant, make_samples)

    def update_autoencoder(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of encoder and generator: likelihood of features, KL, adversarial loss."""
        batch = inputs.batch
        encoded = self._encode(self.autoencoder.ddp_module, inputs, "G")
        assert encoded.fakes is not None
        real, fake = real_and_fake(batch, encoded.fakes)
        # Equation 7: how likely the features of the real images are under those of the
        # reconstructions.
        real_features = self.discriminator.features(real)
        features = self.discriminator.features(Samples(encoded.images, batch.labels))
        likelihood = reconstruction_likelihood(batch, real_features.detach(), features)
        kl = posterior_kl(batch, encoded.mean, encoded.log_variance)
        # Fakes are decoded from detached encodings, so this term reaches the decoder only.
        adversarial = generator_loss(self.discriminator, inputs, real, fake)
        # The likelihood is per feature, so the divergence per image is divided by their number.
        loss = likelihood.nll + self.settings.beta * kl / real_features.shape[1:].numel()
        loss = loss + self.settings.adversarial * adversarial
        orthogonal = orthogonal_loss(self.autoencoder.module, self.config.penalty.orthogonal)
        self.autoencoder.backward(loss + orthogonal)
        # Logged only, in pixels: that of features shrinks and grows with the discriminator.
        squared_error = reconstruction_likelihood(
            batch, batch.real_images, encoded.images
        ).squared_error
        return {
            "loss_G": loss.detach(),
            "adversarial_loss": adversarial.detach(),
            "squared_error": squared_error.detach(),
            "kl": kl.detach(),
            "grad_norm_G": self.autoencoder.step(inputs.rates("G")),
        }

    def _encode(self, network: nn.Module, inputs: StepInputs, phase: str) -> Encoded:
        noise = inputs.noise
        with self.precision.autocast():
            encoded: Encoded = network(
                inputs.batch.real_images,
                noise[f"{phase} posterior"],
                inputs.batch.labels,
                noise[f"{phase} z"],
                # A comparison on the device, since a step draws nothing itself.
                noise[f"{phase} from prior"] < 0.5,
            )
        return encoded
