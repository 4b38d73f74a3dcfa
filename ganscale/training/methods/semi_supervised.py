"""A discriminator that learns classes from a few labels and shapes from all images.

Salimans et al. (2016, arXiv 1606.03498): it minimises the cross-entropy of the labelled images
beside the loss of the game (section 5), and the generator matches the mean of its features on real
images (section 3.1) instead of fooling it, which makes the better classifiers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ganscale.augment.pipeline import AUGMENTATIONS, Augmentation
from ganscale.config import Config, SemiSupervisedMethod
from ganscale.models import build_classifier, build_generator
from ganscale.models.classifying import ClassifyingDiscriminator
from ganscale.training.adversarial_step import Rules, Shown, augmented, frozen, orthogonal
from ganscale.training.distribute import sum_over_ranks
from ganscale.training.methods.method import Mark
from ganscale.training.opponent import Opponent
from ganscale.training.players import Player
from ganscale.training.precision import Precision
from ganscale.training.share import Moment, Share
from ganscale.world import World

__all__ = ["SemiSupervised"]

_FLIP_AND_SHIFT = Augmentation(AUGMENTATIONS["flip_translate"])


class SemiSupervised:
    """An unconditional generator against a classifier.

    Without the game, at weight 0, the classifier learns from the labels alone: what the game is
    worth is seen beside it, with all else equal.
    """

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        assert isinstance(config.method, SemiSupervisedMethod)
        self.adversarial = config.method.adversarial
        self.precision = precision
        self.world_size = world.world_size
        self.generator = Player(networks["generator"], config.optimizer, precision, world)
        self.opponent = Opponent(config, networks["classifier"], precision, world)
        self.players = {"G": self.generator, "D": self.opponent.player}
        learning = ("cross_entropy", "accuracy", "grad_norm_D")
        game = (*self.opponent.statistics, "loss_G", "grad_norm_G") if self.adversarial else ()
        self.statistics = tuple(dict.fromkeys((*game, *learning)))

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        return {
            "generator": build_generator(config.generator_spec),
            "classifier": build_classifier(config.model.model_dump()),
        }

    def step(self, share: Share, moment: Moment, mark: Mark) -> dict[str, Tensor]:
        mark("discriminator")
        loss, accuracy = self.supervised(share)
        seen = {"cross_entropy": loss.detach(), "accuracy": accuracy}
        if not self.adversarial:
            self.opponent.player.backward(loss)
            norm = self.opponent.player.step(moment.nimg, moment.lr_factor)
            return seen | {"grad_norm_D": norm}
        rules = self.opponent.rules(moment)
        with self.precision.autocast(), torch.no_grad():
            fake = Shown(self.generator.module(share.random.normal("D z", share.z_dim)))
        seen |= self.opponent.learn(
            share,
            moment,
            rules,
            Shown(share.real_images),
            fake,
            also=loss,
            game_weight=self.adversarial,
        )
        if moment.generator_learns:
            mark("generator")
            seen["loss_G"] = self.generator_phase(share, rules)
            seen["grad_norm_G"] = self.generator.step(moment.nimg_after, moment.lr_factor)
        return seen

    def supervised(self, share: Share) -> tuple[Tensor, Tensor]:
        """Cross-entropy of this share's labelled images, flipped and shifted; and accuracy."""
        assert share.labelled is not None
        labels = share.labelled.labels
        rows = share.random.rows_of(_FLIP_AND_SHIFT.draw, "labelled augmentation")
        images = _FLIP_AND_SHIFT(share.labelled.images, rows, 1.0)
        with self.precision.autocast():
            logits = self.opponent.player.network(images, classes=True)
        hits = (logits.argmax(1) == labels).float().sum()
        loss = cross_entropy(logits, labels, reduction="sum")
        return loss * share.weight, hits * share.weight

    def generator_phase(self, share: Share, rules: Rules) -> Tensor:
        """The generator's gradients; returns the squared distance of mean features, ().

        Each rank differentiates its own images' part in the global mean, so that the gradient that
        DDP averages is that of the distance.
        """
        z = share.random.normal("G z", share.z_dim)
        with self.precision.autocast():
            fake = self.generator.network(z)
        made = self._mean_features(share, rules, "G fake", fake)
        with torch.no_grad():
            real = self._mean_features(share, rules, "G real", share.real_images)
            apart = sum_over_ranks(made - real) / self.world_size
        self.generator.backward(2 * (apart @ made) + orthogonal(self.generator, rules))
        return apart.square().sum()

    def figures(self, nimg: int) -> dict[str, float]:
        return self.opponent.figures(nimg)

    def state_dict(self) -> dict[str, Any]:
        return self.opponent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.opponent.load_state_dict(state)

    def _mean_features(self, share: Share, rules: Rules, purpose: str, images: Tensor) -> Tensor:
        """(C,), of this share; averaged over ranks they are those of the global batch."""
        classifier = self.opponent.player.module
        assert isinstance(classifier, ClassifyingDiscriminator)
        with self.precision.autocast(), frozen(classifier):
            features = classifier.features(augmented(rules, share, purpose, images))
        return features.float().sum(0) * share.weight
