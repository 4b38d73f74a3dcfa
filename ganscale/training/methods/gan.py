"""A generator against a discriminator (Goodfellow et al. 2014, arXiv 1406.2661)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ganscale.config import Config
from ganscale.models import build_discriminator, build_generator
from ganscale.training.adversarial_step import PhaseResult, Rules, Shown, orthogonal
from ganscale.training.methods.method import Mark
from ganscale.training.opponent import Opponent
from ganscale.training.players import Player
from ganscale.training.precision import Precision
from ganscale.training.share import Moment, Share
from ganscale.world import World

__all__ = ["Gan"]


class Gan:
    """Both players learn in turn, on latents of their own."""

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        self.precision = precision
        self.generator = Player(networks["generator"], config.optimizer, precision, world)
        self.opponent = Opponent(config, networks["discriminator"], precision, world)
        self.players = {"G": self.generator, "D": self.opponent.player}
        self.statistics = (*self.opponent.statistics, "loss_G", "grad_norm_G")

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        spec = config.generator_spec
        return {"generator": build_generator(spec), "discriminator": build_discriminator(spec)}

    def step(self, share: Share, moment: Moment, mark: Mark) -> dict[str, Tensor]:
        rules = self.opponent.rules(moment)
        mark("discriminator")
        seen = self.opponent.learn(share, moment, rules, *self._shown(share))
        if moment.generator_learns:
            mark("generator")
            seen["loss_G"] = self.generator_phase(share, rules)
            seen["grad_norm_G"] = self.generator.step(moment.nimg_after, moment.lr_factor)
        return seen

    def discriminator_phase(self, share: Share, rules: Rules) -> PhaseResult:
        """The discriminator's gradients."""
        return self.opponent.phase(share, rules, *self._shown(share))

    def generator_phase(self, share: Share, rules: Rules) -> Tensor:
        """The generator's gradients; returns its loss without penalties, ()."""
        z = share.random.normal("G z", share.z_dim)
        with self.precision.autocast():
            fake = Shown(self.generator.network(z, share.labels), share.labels)
        real = Shown(share.real_images, share.labels)
        loss = self.opponent.fooling_loss(share, rules, real, fake)
        self.generator.backward(loss + orthogonal(self.generator, rules))
        return loss.detach()

    def figures(self, nimg: int) -> dict[str, float]:
        return self.opponent.figures(nimg)

    def state_dict(self) -> dict[str, Any]:
        return self.opponent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.opponent.load_state_dict(state)

    def _shown(self, share: Share) -> tuple[Shown, Shown]:
        z = share.random.normal("D z", share.z_dim)
        with self.precision.autocast(), torch.no_grad():
            fake = self.generator.module(z, share.labels)
        return Shown(share.real_images, share.labels), Shown(fake, share.labels)
