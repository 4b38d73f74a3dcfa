"""A discriminator that learns classes from a few labels and shapes from all images.

Salimans et al. (2016, arXiv 1606.03498): it minimises the cross-entropy of the labelled images
beside the adversarial loss (section 5), and the generator matches the mean of its features on real
images (section 3.1) instead of minimising an adversarial loss, which makes the better classifiers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ganscale.config import Config, SemiSupervisedMethod
from ganscale.generation.latents import Draw
from ganscale.models import build_classifier, build_generator
from ganscale.models.classifying import ClassifyingDiscriminator
from ganscale.training.collectives import sum_over_ranks
from ganscale.training.inputs import StepInputs, StepVariant
from ganscale.training.optimized_model import OptimizedModel
from ganscale.training.precision import Precision
from ganscale.training.steps.adversarial_schedules import adversarial_draws, augmentation_draw
from ganscale.training.steps.discriminator import (
    DiscriminatorTrainer,
    Samples,
    flip_and_shift,
    frozen,
    orthogonal_loss,
)
from ganscale.training.steps.method import PhaseUpdate, TrainingMethod
from ganscale.world import World

__all__ = ["SemiSupervised"]


class SemiSupervised(TrainingMethod):
    """An unconditional generator against a classifier.

    With `adversarial` 0 the classifier learns from the labels alone, with all else equal, so that
    the two can be compared.
    """

    discriminator: DiscriminatorTrainer

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        assert isinstance(config.method, SemiSupervisedMethod)
        super().__init__(config, precision)
        self.adversarial = config.method.adversarial
        self.world_size = world.world_size
        self.generator = OptimizedModel(networks["generator"], config.optimizer, precision, world)
        self.discriminator = DiscriminatorTrainer(config, networks["classifier"], precision, world)
        self.models = {"G": self.generator, "D": self.discriminator.model}
        own = ("cross_entropy", "accuracy", "grad_norm_D")
        adversarial = (*self.discriminator.statistics, "loss_G", "grad_norm_G")
        names = (*adversarial, *own) if self.adversarial else own
        # `grad_norm_D` is in both lists; a name may come once.
        self.statistics = tuple(dict.fromkeys(names))

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        return {
            "generator": build_generator(config.generator_spec),
            "classifier": build_classifier(config.model.model_dump()),
        }

    def draws(self, variant: StepVariant) -> dict[str, Draw]:
        draws = {"labelled augmentation": augmentation_draw("flip_translate")}
        if self.adversarial:
            draws |= self.latent_draws(variant, "z")
            draws |= adversarial_draws(self.config, variant, judges_real=True)
        return draws

    def phases(self, variant: StepVariant) -> list[PhaseUpdate]:
        phases: list[PhaseUpdate] = [("discriminator", self.update_classifier)]
        if variant.generator_turn and self.adversarial:
            phases.append(("generator", self.update_generator))
        return phases

    def update_classifier(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the classifier, on labels and, with `adversarial`, on real and fake."""
        # Labelled, real and fake images go through in three forwards and one backward: the sum of
        # the supervised and the adversarial loss is one objective with one optimizer.
        loss, accuracy = self.supervised_loss(inputs)
        statistics = {"cross_entropy": loss.detach(), "accuracy": accuracy}
        classifier = self.discriminator.model
        if not self.adversarial:
            classifier.backward(loss)
            return statistics | {"grad_norm_D": classifier.step(inputs.rates("D"))}
        with self.precision.autocast(), torch.no_grad():
            fake_images = self.generator.module(inputs.noise["D z"])
        return statistics | self.discriminator.update(
            inputs,
            variant,
            Samples(inputs.batch.real_images),
            Samples(fake_images),
            extra_loss=loss,
            loss_factor=self.adversarial,
        )

    def supervised_loss(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Cross-entropy of this rank's labelled images, flipped and shifted; and the accuracy."""
        batch = inputs.batch
        assert batch.labelled is not None
        labels = batch.labelled.labels
        # Always, whatever the augmentation of the discriminator is: few labels are seen many times.
        images = flip_and_shift(batch.labelled.images, inputs.noise["labelled augmentation"])
        with self.precision.autocast():
            # Through the wrapper, so that this forward's gradients are averaged with the others'.
            logits = self.discriminator.model.ddp_module(images, classes=True)
        num_correct = (logits.argmax(1) == labels).float().sum()
        loss = cross_entropy(logits, labels, reduction="sum")
        return loss * batch.loss_weight, num_correct * batch.loss_weight

    def update_generator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the generator on the squared distance of mean features.

        Each rank differentiates its own images' part in the global mean, so that the gradient that
        DDP averages is that of the distance.
        """
        with self.precision.autocast():
            fake_images = self.generator.ddp_module(inputs.noise["G z"])
        fake_mean = self._mean_features(inputs, "G fake", fake_images)
        with torch.no_grad():
            real_mean = self._mean_features(inputs, "G real", inputs.batch.real_images)
            # The gradient of ||m||^2 is 2 m dm: m is a constant of the global batch here, and only
            # this rank's part of dm is differentiated.
            difference = sum_over_ranks(fake_mean - real_mean) / self.world_size
        orthogonal = orthogonal_loss(self.generator.module, self.config.penalty.orthogonal)
        self.generator.backward(2 * (difference @ fake_mean) + orthogonal)
        return {
            "loss_G": difference.square().sum(),
            "grad_norm_G": self.generator.step(inputs.rates("G")),
        }

    def _mean_features(self, inputs: StepInputs, purpose: str, images: Tensor) -> Tensor:
        """(C,), of this rank's images; averaged over ranks they are those of the global batch."""
        classifier = self.discriminator.model.module
        assert isinstance(classifier, ClassifyingDiscriminator)
        with self.precision.autocast(), frozen(classifier):
            # Augmented as in the discriminator's phase: it knows only such images.
            features = classifier.features(self.discriminator.augment(inputs, purpose, images))
        return features.float().sum(0) * inputs.batch.loss_weight
