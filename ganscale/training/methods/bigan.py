"""Generator and encoder against a discriminator of pairs.

It tells (x, E(x)) from (G(z), z); at the optimum the two inverse each other (Donahue et al. 2017,
arXiv 1605.09782; Dumoulin et al. 2017, arXiv 1606.00704, whose encoder draws its latents, as here).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ganscale.config import Config
from ganscale.models import build_encoder, build_generator, build_joint_discriminator
from ganscale.models.autoencoder import sampled
from ganscale.training.adversarial_step import PhaseResult, Rules, Shown, orthogonal
from ganscale.training.methods.method import Mark
from ganscale.training.opponent import Opponent
from ganscale.training.players import Player
from ganscale.training.precision import Precision
from ganscale.training.share import Moment, Share
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


class Bigan:
    """Encoder and generator are one player, the discriminator of pairs is the other."""

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        self.precision = precision
        model = _Pairs(networks["encoder"], networks["generator"])
        self.player = Player(model, config.optimizer, precision, world)
        self.opponent = Opponent(config, networks["discriminator"], precision, world)
        self.players = {"G": self.player, "D": self.opponent.player}
        self.statistics = (*self.opponent.statistics, "loss_G", "grad_norm_G")

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        spec = config.generator_spec
        return {
            "generator": build_generator(spec),
            "encoder": build_encoder(spec),
            "discriminator": build_joint_discriminator(spec),
        }

    def step(self, share: Share, moment: Moment, mark: Mark) -> dict[str, Tensor]:
        rules = self.opponent.rules(moment)
        mark("discriminator")
        with torch.no_grad():
            pairs = self._pairs(self.player.module, share, "D")
        seen = self.opponent.learn(share, moment, rules, *pairs)
        if moment.generator_learns:
            mark("generator and encoder")
            seen["loss_G"] = self.generator_phase(share, rules)
            seen["grad_norm_G"] = self.player.step(moment.nimg_after, moment.lr_factor)
        return seen

    def discriminator_phase(self, share: Share, rules: Rules) -> PhaseResult:
        """The discriminator's gradients."""
        with torch.no_grad():
            pairs = self._pairs(self.player.module, share, "D")
        return self.opponent.phase(share, rules, *pairs)

    def generator_phase(self, share: Share, rules: Rules) -> Tensor:
        """Gradients of generator and encoder; returns their loss, ()."""
        real, fake = self._pairs(self.player.network, share, "G")
        loss = self.opponent.fooling_loss(share, rules, real, fake, real_learns=True)
        self.player.backward(loss + orthogonal(self.player, rules))
        return loss.detach()

    def figures(self, nimg: int) -> dict[str, float]:
        return self.opponent.figures(nimg)

    def state_dict(self) -> dict[str, Any]:
        return self.opponent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.opponent.load_state_dict(state)

    def _pairs(self, network: nn.Module, share: Share, player: str) -> tuple[Shown, Shown]:
        noise = share.random.normal(f"{player} posterior", share.z_dim)
        z = share.random.normal(f"{player} z", share.z_dim)
        with self.precision.autocast():
            encoded, made = network(share.real_images, noise, z)
        return Shown(share.real_images, encoded), Shown(made, z)
