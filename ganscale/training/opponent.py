"""The discriminator's side of a method: how it learns, what it feeds back, what fooling costs."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from ganscale.augment.pipeline import AUGMENTATIONS, Augmentation
from ganscale.config import Config
from ganscale.models.activations import middle_features
from ganscale.objectives.adversarial import OBJECTIVES
from ganscale.training.adversarial_step import (
    PhaseResult,
    Rules,
    Shown,
    discriminator_phase,
    fooling_loss,
    frozen,
)
from ganscale.training.feedback import Feedback
from ganscale.training.players import Player
from ganscale.training.precision import Precision
from ganscale.training.share import Moment, Share
from ganscale.world import World

__all__ = ["Opponent", "penalty_weights"]


class Opponent:
    """A discriminator that learns to tell real from fake, by the rules of the configuration."""

    def __init__(
        self, config: Config, discriminator: nn.Module, precision: Precision, world: World
    ) -> None:
        self.config = config
        self.precision = precision
        optimizer = config.optimizer
        self.player = Player(
            discriminator,
            optimizer,
            precision,
            world,
            lr=optimizer.lr_discriminator,
            clip_weights=optimizer.clip_weights,
        )
        self.feedback = Feedback(config.augment, world.world_size, world.torch_device)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of what `learn` returns."""
        names = ("loss_D", "real_logits", "fake_logits", "grad_norm_D")
        return (*names, *(f"penalty_{name}" for name in self.config.penalty.names))

    def rules(self, moment: Moment) -> Rules:
        """What holds in this step."""
        penalty, augment, nimg = self.config.penalty, self.config.augment, moment.nimg
        return Rules(
            objective=OBJECTIVES[self.config.objective.name],
            precision=self.precision,
            penalties=penalty_weights(self.config, nimg=nimg, step=moment.step),
            orthogonal=penalty.orthogonal,
            gradient_normalisation=penalty.gradient_normalisation,
            top_k=self.config.objective.top_k.at(nimg),
            augmentation=None if augment.name == "none" else _augmentation(augment.name),
            augment_p=self._augment_p(nimg),
            lecam_anchors=self.feedback.anchors,
        )

    def phase(self, share: Share, rules: Rules, real: Shown, fake: Shown) -> PhaseResult:
        """Gradients of the discriminator; the weights stay."""
        return discriminator_phase(self.player, rules, share, real, fake)

    def learn(
        self,
        share: Share,
        moment: Moment,
        rules: Rules,
        real: Shown,
        fake: Shown,
        *,
        also: Tensor | float = 0.0,
        game_weight: float = 1.0,
    ) -> dict[str, Tensor]:
        """One update on real images and as many fakes, and on `also`; returns the statistics."""
        seen = discriminator_phase(
            self.player, rules, share, real, fake, also=also, game_weight=game_weight
        )
        norm = self.player.step(moment.nimg, moment.lr_factor)
        if self.config.augment.target is not None or self.config.penalty.lecam:
            self.feedback.update(seen, step=moment.step, batch_size=moment.batch_size)
        return {
            "loss_D": seen.loss,
            "real_logits": seen.real_logits,
            "fake_logits": seen.fake_logits,
            "grad_norm_D": norm,
            **{f"penalty_{name}": value for name, value in seen.penalties.items()},
        }

    def fooling_loss(
        self, share: Share, rules: Rules, real: Shown, fake: Shown, *, real_learns: bool = False
    ) -> Tensor:
        """The loss of whoever made what is shown, (); it goes to them, not to the discriminator."""
        return fooling_loss(self.player, rules, share, real, fake, real_learns=real_learns)

    def features(self, shown: Shown) -> Tensor:
        """Its features of images, (n, C, h, w), through which gradients go to the images."""
        with self.precision.autocast(), frozen(self.player.module):
            return middle_features(self.player.module, shown.images, shown.beside)

    def figures(self, nimg: int) -> dict[str, float]:
        """What a row tells of it besides its statistics."""
        if self.config.augment.name == "none":
            return {}
        return {"augment_p": float(self._augment_p(nimg))}

    def state_dict(self) -> dict[str, Any]:
        """What it feeds back; the player is saved with the others."""
        return {"feedback": self.feedback.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state in place."""
        self.feedback.load_state_dict(state["feedback"])

    def _augment_p(self, nimg: int) -> Tensor | float:
        adaptive = self.config.augment.target is not None
        return self.feedback.augment_p if adaptive else self.config.augment.p.at(nimg)


@cache
def _augmentation(name: str) -> Augmentation:
    return Augmentation(AUGMENTATIONS[name])


def penalty_weights(config: Config, *, nimg: int, step: int) -> dict[str, float]:
    """The discriminator's penalties of a step and their weights; lazy ones in some steps only."""
    penalty = config.penalty
    lazy = penalty.interval if step % penalty.interval == 0 else 0
    suffix = "_finite_difference" if penalty.form == "finite_difference" else ""
    weights = {
        f"r1{suffix}": lazy * penalty.r1.at(nimg),
        f"r2{suffix}": lazy * penalty.r2.at(nimg),
        "wgan_gp": lazy * penalty.wgan_gp,
        "dragan": lazy * penalty.dragan,
        "consistency": penalty.consistency,
        "lecam": penalty.lecam,
    }
    return {name: weight for name, weight in weights.items() if weight}
