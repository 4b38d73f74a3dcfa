"""An encoder for a generator that is trained already (Zhu et al. 2020, arXiv 2004.00049).

The generator, which stays as it is, is to reconstruct what it encodes: in pixels, in the
features of a discriminator, and so that the discriminator takes it for real (equations 2 and 3;
features of the discriminator in place of an ImageNet network's, which not everybody has).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ganscale.config import Config, EncoderMethod
from ganscale.errors import ConfigError
from ganscale.generation.latents import Draw
from ganscale.generation.snapshot import load_generator
from ganscale.models import build_discriminator, build_encoder
from ganscale.training.step_inputs import StepInputs, StepVariant
from ganscale.training.steps.adversarial_schedules import adversarial_draws
from ganscale.training.steps.discriminator import Samples, real_and_fake
from ganscale.training.steps.generator import generator_loss
from ganscale.training.steps.likelihood import reconstruction_likelihood
from ganscale.training.steps.method import AdversarialMethod


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


class InDomainEncoder(AdversarialMethod):
    """The encoder learns, against a discriminator of its reconstructions."""

    letter = "E"
    generator_phase = "encoder"
    generator_statistics = ("loss_E", "grad_norm_E", "adversarial_loss", "squared_error")

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

    def generator_module(self, networks: Mapping[str, nn.Module]) -> nn.Module:
        return _Inverse(networks["encoder"], networks["generator"])

    def draws(self, variant: StepVariant) -> dict[str, Draw]:
        return adversarial_draws(self.config, variant)

    def make_samples(self, inputs: StepInputs, variant: StepVariant) -> tuple[Samples, Samples]:
        """The fakes are reconstructions of the real images."""
        with self.precision.autocast():
            fake_images = self.generator.module(inputs.batch.real_images, inputs.batch.labels)
        return real_and_fake(inputs.batch, fake_images)

    def update_generator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the encoder: likelihoods of pixels and features, adversarial loss."""
        assert isinstance(self.config.method, EncoderMethod)
        batch = inputs.batch
        with self.precision.autocast():
            fake_images = self.generator.ddp_module(batch.real_images, batch.labels)
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
        loss = pixels.nll + features.nll + self.config.method.adversarial * adversarial
        return self.minimise(inputs, loss) | {
            "adversarial_loss": adversarial.detach(),
            "squared_error": pixels.squared_error.detach(),
        }
