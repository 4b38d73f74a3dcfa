"""A variational autoencoder (Kingma and Welling 2014, arXiv 1312.6114), with the generator as its
decoder; beta as in Higgins et al. (2017, ICLR)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ganscale.config import Config, VaeMethod
from ganscale.models import build_encoder, build_generator
from ganscale.models.autoencoder import Autoencoder
from ganscale.training.methods.likelihood import divergence, likeness
from ganscale.training.methods.method import Mark
from ganscale.training.players import Player
from ganscale.training.precision import Precision
from ganscale.training.share import Moment, Share
from ganscale.world import World

__all__ = ["Vae"]


class Vae:
    """Encoder and generator are one player; its loss is the negative bound per dimension."""

    statistics = ("loss_G", "grad_norm_G", "squared_error", "kl")

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        assert isinstance(config.method, VaeMethod)
        self.beta = config.method.beta
        self.precision = precision
        model = Autoencoder(networks["encoder"], networks["generator"])
        self.player = Player(model, config.optimizer, precision, world)
        self.players = {"G": self.player}

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        spec = config.generator_spec
        return {"generator": build_generator(spec), "encoder": build_encoder(spec)}

    def step(self, share: Share, moment: Moment, mark: Mark) -> dict[str, Tensor]:
        mark("autoencoder")
        seen = self.phase(share)
        seen["grad_norm_G"] = self.player.step(moment.nimg, moment.lr_factor)
        return seen

    def phase(self, share: Share) -> dict[str, Tensor]:
        """Gradients of both networks."""
        noise = share.random.normal("posterior", share.z_dim)
        with self.precision.autocast():
            made = self.player.network(share.real_images, noise, share.labels)
        like = likeness(share, share.real_images, made.images)
        kl = divergence(share, made.mean, made.log_variance)
        loss = like.nll + self.beta * kl / share.real_images.shape[1:].numel()
        self.player.backward(loss)
        found = {"loss_G": loss, "squared_error": like.squared_error, "kl": kl}
        return {name: value.detach() for name, value in found.items()}

    def figures(self, nimg: int) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
