"""An encoder for a generator that is trained already (Zhu et al. 2020, arXiv 2004.00049).

What it encodes is to come back through the generator, which stays as it is: in pixels, in the
features of a discriminator, and so that the discriminator takes it for real (equations 2 and 3;
features of the discriminator in place of an ImageNet network's, which not everybody has).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ganscale.config import Config, EncoderMethod
from ganscale.errors import ConfigError
from ganscale.generation.snapshot import load_generator
from ganscale.models import build_discriminator, build_encoder
from ganscale.training.adversarial_step import Rules, Shown, orthogonal
from ganscale.training.methods.likelihood import likeness
from ganscale.training.methods.method import Mark
from ganscale.training.opponent import Opponent
from ganscale.training.players import Player
from ganscale.training.precision import Precision
from ganscale.training.share import Moment, Share
from ganscale.world import World

__all__ = ["InDomainEncoder"]


class _Inverse(nn.Module):
    """Images through the encoder and a generator that does not learn."""

    def __init__(self, encoder: nn.Module, generator: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.generator = generator.eval().requires_grad_(False)

    def forward(self, images: Tensor, labels: Tensor | None) -> Tensor:
        mean, _ = self.encoder(images)
        made: Tensor = self.generator(mean, labels)
        return made


class InDomainEncoder:
    """The encoder is a player, the discriminator of its reconstructions the other."""

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        assert isinstance(config.method, EncoderMethod)
        self.adversarial = config.method.adversarial
        self.precision = precision
        model = _Inverse(networks["encoder"], networks["generator"])
        self.player = Player(model, config.optimizer, precision, world)
        self.opponent = Opponent(config, networks["discriminator"], precision, world)
        self.players = {"E": self.player, "D": self.opponent.player}
        mine = ("loss_E", "grad_norm_E", "fooling", "squared_error")
        self.statistics = (*self.opponent.statistics, *mine)

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        assert isinstance(config.method, EncoderMethod)
        spec = config.generator_spec
        trained = load_generator(config.method.generator)
        theirs = trained.info["model"]
        if theirs != spec:
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

    def step(self, share: Share, moment: Moment, mark: Mark) -> dict[str, Tensor]:
        rules = self.opponent.rules(moment)
        real = Shown(share.real_images, share.labels)
        mark("discriminator")
        with self.precision.autocast(), torch.no_grad():
            made = self.player.module(share.real_images, share.labels)
        seen = self.opponent.learn(share, moment, rules, real, Shown(made, share.labels))
        if moment.generator_learns:
            mark("encoder")
            seen |= self.phase(share, rules)
            seen["grad_norm_E"] = self.player.step(moment.nimg_after, moment.lr_factor)
        return seen

    def phase(self, share: Share, rules: Rules) -> dict[str, Tensor]:
        """Gradients of the encoder."""
        with self.precision.autocast():
            made = self.player.network(share.real_images, share.labels)
        real, fake = Shown(share.real_images, share.labels), Shown(made, share.labels)
        pixels = likeness(share, real.images, made)
        features = likeness(
            share, self.opponent.features(real).detach(), self.opponent.features(fake)
        )
        fooling = self.opponent.fooling_loss(share, rules, real, fake)
        loss = pixels.nll + features.nll + self.adversarial * fooling
        self.player.backward(loss + orthogonal(self.player, rules))
        found = {"loss_E": loss, "fooling": fooling, "squared_error": pixels.squared_error}
        return {name: value.detach() for name, value in found.items()}

    def figures(self, nimg: int) -> dict[str, float]:
        return self.opponent.figures(nimg)

    def state_dict(self) -> dict[str, Any]:
        return self.opponent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.opponent.load_state_dict(state)
