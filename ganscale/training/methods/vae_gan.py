"""An autoencoder that a discriminator teaches what counts (Larsen et al. 2016, arXiv 1512.09300).

The likelihood is that of the image's features in the discriminator (equation 7), not of its pixels;
and what is decoded is to fool it, half of it from encoded latents and half from the prior. As in
algorithm 1 of the paper the encoder is not told how well it fools. Their weight gamma between the
decoder's terms is that of the adversarial one here, which Adam makes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ganscale.config import Config, VaeGanMethod
from ganscale.models import build_discriminator, build_encoder, build_generator
from ganscale.models.autoencoder import Autoencoder, Encoded
from ganscale.training.adversarial_step import Rules, Shown, orthogonal
from ganscale.training.methods.likelihood import divergence, likeness
from ganscale.training.methods.method import Mark
from ganscale.training.opponent import Opponent
from ganscale.training.players import Player
from ganscale.training.precision import Precision
from ganscale.training.share import Moment, Share
from ganscale.world import World

__all__ = ["VaeGan"]


class VaeGan:
    """Encoder and generator are one player, the discriminator is the other."""

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        assert isinstance(config.method, VaeGanMethod)
        self.settings = config.method
        self.precision = precision
        model = Autoencoder(networks["encoder"], networks["generator"])
        self.player = Player(model, config.optimizer, precision, world)
        self.opponent = Opponent(config, networks["discriminator"], precision, world)
        self.players = {"G": self.player, "D": self.opponent.player}
        mine = ("loss_G", "grad_norm_G", "fooling", "squared_error", "kl")
        self.statistics = (*self.opponent.statistics, *mine)

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        spec = config.generator_spec
        return {
            "generator": build_generator(spec),
            "encoder": build_encoder(spec),
            "discriminator": build_discriminator(spec),
        }

    def step(self, share: Share, moment: Moment, mark: Mark) -> dict[str, Tensor]:
        rules = self.opponent.rules(moment)
        real = Shown(share.real_images, share.labels)
        mark("discriminator")
        with torch.no_grad():
            fakes = self._made(self.player.module, share, "D").fakes
        assert fakes is not None
        seen = self.opponent.learn(share, moment, rules, real, Shown(fakes, share.labels))
        if moment.generator_learns:
            mark("autoencoder")
            seen |= self.phase(share, rules)
            seen["grad_norm_G"] = self.player.step(moment.nimg_after, moment.lr_factor)
        return seen

    def phase(self, share: Share, rules: Rules) -> dict[str, Tensor]:
        """Gradients of encoder and generator."""
        made = self._made(self.player.network, share, "G")
        assert made.fakes is not None
        real, fake = Shown(share.real_images, share.labels), Shown(made.fakes, share.labels)
        wanted, got = (
            self.opponent.features(real),
            self.opponent.features(Shown(made.images, share.labels)),
        )
        like = likeness(share, wanted.detach(), got)
        kl = divergence(share, made.mean, made.log_variance)
        fooling = self.opponent.fooling_loss(share, rules, real, fake)
        loss = like.nll + self.settings.beta * kl / wanted.shape[1:].numel()
        loss = loss + self.settings.adversarial * fooling
        self.player.backward(loss + orthogonal(self.player, rules))
        squared_error = likeness(share, share.real_images, made.images).squared_error
        found = {"loss_G": loss, "fooling": fooling, "squared_error": squared_error, "kl": kl}
        return {name: value.detach() for name, value in found.items()}

    def figures(self, nimg: int) -> dict[str, float]:
        return self.opponent.figures(nimg)

    def state_dict(self) -> dict[str, Any]:
        return self.opponent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.opponent.load_state_dict(state)

    def _made(self, network: nn.Module, share: Share, player: str) -> Encoded:
        random = share.random
        with self.precision.autocast():
            made: Encoded = network(
                share.real_images,
                random.normal(f"{player} posterior", share.z_dim),
                share.labels,
                random.normal(f"{player} z", share.z_dim),
                random.uniform(f"{player} from prior", 1) < 0.5,
            )
        return made
