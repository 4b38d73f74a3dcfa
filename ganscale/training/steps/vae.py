"""A variational autoencoder (Kingma and Welling 2014, arXiv 1312.6114), with the generator as its
decoder; beta as in Higgins et al. (2017, ICLR)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ganscale.config import Config, VaeMethod
from ganscale.generation.latents import Draw, normal
from ganscale.models import build_encoder, build_generator
from ganscale.models.autoencoder import Autoencoder
from ganscale.training.optimized_model import OptimizedModel
from ganscale.training.precision import Precision
from ganscale.training.step_inputs import StepInputs, StepVariant
from ganscale.training.steps.likelihood import posterior_kl, reconstruction_likelihood
from ganscale.training.steps.method import PhaseUpdate, TrainingMethod
from ganscale.world import World


class Vae(TrainingMethod):
    """Encoder and generator learn as one; the loss is the negative bound per dimension."""

    statistics = ("loss_G", "grad_norm_G", "squared_error", "kl")

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        assert isinstance(config.method, VaeMethod)
        super().__init__(config, precision)
        self.beta = config.method.beta
        autoencoder = Autoencoder(networks["encoder"], networks["generator"])
        self.autoencoder = OptimizedModel(autoencoder, config.optimizer, precision, world)
        self.models = {"G": self.autoencoder}

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        spec = config.generator_spec
        return {"generator": build_generator(spec), "encoder": build_encoder(spec)}

    def draws(self, variant: StepVariant) -> dict[str, Draw]:
        return {"posterior": normal(self.config.model.z_dim)}

    def phases(self, variant: StepVariant) -> list[PhaseUpdate]:
        return [("autoencoder", self.update)]

    def update(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of encoder and generator on the negative bound, in nats per dimension."""
        batch = inputs.batch
        with self.precision.autocast():
            encoded = self.autoencoder.ddp_module(
                batch.real_images, inputs.noise["posterior"], batch.labels
            )
        likelihood = reconstruction_likelihood(batch, batch.real_images, encoded.images)
        kl = posterior_kl(batch, encoded.mean, encoded.log_variance)
        # The likelihood is per dimension of the image, so the divergence, which is per image, is
        # divided by their number; beta = 1 is then the bound itself.
        loss = likelihood.nll + self.beta * kl / batch.real_images.shape[1:].numel()
        self.autoencoder.backward(loss)
        return {
            "loss_G": loss.detach(),
            "squared_error": likelihood.squared_error.detach(),
            "kl": kl.detach(),
            "grad_norm_G": self.autoencoder.step(inputs.rates("G")),
        }
