"""An autoencoder trained against a discriminator (Larsen et al. 2016, arXiv 1512.09300).

The likelihood is that of the image's features in the discriminator (equation 7), not of its pixels.
The decoder also minimises the adversarial loss, on images of latents of which half are encoded and
half drawn from the prior. As in algorithm 1 of the paper the encoder gets no gradient of the
adversarial loss. The paper's weight gamma between the decoder's terms is here that of the
adversarial one, which is the same under Adam.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ganscale.config import Config, VaeGanMethod
from ganscale.generation.latents import Draw, uniform
from ganscale.models import build_discriminator, build_encoder, build_generator
from ganscale.models.autoencoder import Autoencoder, Encoded
from ganscale.training.step_inputs import StepInputs, StepVariant
from ganscale.training.steps.adversarial_schedules import adversarial_draws
from ganscale.training.steps.discriminator import Samples, real_and_fake
from ganscale.training.steps.generator import generator_loss
from ganscale.training.steps.likelihood import (
    global_squared_error,
    posterior_kl,
    reconstruction_likelihood,
)
from ganscale.training.steps.method import AdversarialMethod


class VaeGan(AdversarialMethod):
    """Encoder and generator learn as one, against the discriminator."""

    generator_phase = "autoencoder"
    generator_statistics = ("loss_G", "grad_norm_G", "adversarial_loss", "squared_error", "kl")

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        spec = config.generator_spec
        return {
            "generator": build_generator(spec),
            "encoder": build_encoder(spec),
            "discriminator": build_discriminator(spec),
        }

    def generator_module(self, networks: Mapping[str, nn.Module]) -> nn.Module:
        return Autoencoder(networks["encoder"], networks["generator"])

    def draws(self, variant: StepVariant) -> dict[str, Draw]:
        latents = self.latent_draws(variant, "posterior", "z")
        draws = latents | adversarial_draws(self.config, variant)
        for phase in ("D", "G") if variant.generator_turn else ("D",):
            # A number below one half takes a row from the prior: fakes are of both kinds that
            # algorithm 1 of the paper shows the discriminator.
            draws[f"{phase} from prior"] = uniform(1)
        return draws

    def make_samples(self, inputs: StepInputs, variant: StepVariant) -> tuple[Samples, Samples]:
        """The fakes are decoded from both kinds of latents."""
        fake_images = self._encode(self.generator.module, inputs, "D").fakes
        assert fake_images is not None
        return real_and_fake(inputs.batch, fake_images)

    def update_generator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of encoder and generator: likelihood of features, KL, adversarial loss."""
        batch, settings = inputs.batch, self.config.method
        assert isinstance(settings, VaeGanMethod)
        encoded = self._encode(self.generator.ddp_module, inputs, "G")
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
        loss = likelihood.nll + settings.beta * kl / real_features.shape[1:].numel()
        loss = loss + settings.adversarial * adversarial
        statistics = self.minimise(inputs, loss)
        # Logged only, in pixels: that of features shrinks and grows with the discriminator.
        squared_error = global_squared_error(batch, batch.real_images, encoded.images)
        return statistics | {
            "adversarial_loss": adversarial.detach(),
            "squared_error": squared_error.detach(),
            "kl": kl.detach(),
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
