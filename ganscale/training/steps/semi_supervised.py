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
from ganscale.training.precision import Precision
from ganscale.training.step_inputs import StepInputs, StepVariant
from ganscale.training.steps.adversarial_schedules import adversarial_draws, augmentation_draw
from ganscale.training.steps.discriminator import (
    Samples,
    flip_and_shift,
    frozen,
    orthogonal_loss,
)
from ganscale.training.steps.method import AdversarialMethod, PhaseUpdate
from ganscale.training.steps.statistics import summed
from ganscale.world import World


class SemiSupervised(AdversarialMethod):
    """An unconditional generator against a classifier.

    With `adversarial` 0 the classifier learns from the labels alone, with all else equal, so that
    the two can be compared.
    """

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> None:
        assert isinstance(config.method, SemiSupervisedMethod)
        super().__init__(config, networks, precision, world)
        self.adversarial = config.method.adversarial
        self.world_size = world.world_size
        own = ("cross_entropy", "accuracy", "grad_norm_D")
        names = (*self.statistics, *own) if self.adversarial else own
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
        # Without an adversarial loss the generator has nothing to learn from.
        return super().phases(variant)[: None if self.adversarial else 1]

    def make_samples(self, inputs: StepInputs, variant: StepVariant) -> tuple[Samples, Samples]:
        with self.precision.autocast():
            fake_images = self.generator.module(inputs.noise["D z"])
        return Samples(inputs.batch.real_images), Samples(fake_images)

    def update_discriminator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the classifier, on labels and, with `adversarial`, on real and fake."""
        if not self.adversarial:
            return self._learn_labels(inputs)

        # Labelled, real and fake images go through in three forwards and one backward: the sum of
        # the supervised and the adversarial loss is one objective with one optimizer.
        return self.discriminator.update(
            inputs,
            variant,
            lambda part: self.make_samples(part, variant),
            extra_loss=self.supervised_loss,
            loss_factor=self.adversarial,
        )

    def _learn_labels(self, inputs: StepInputs) -> dict[str, Tensor]:
        classifier = self.discriminator.model

        def learn(part: StepInputs) -> dict[str, Tensor]:
            loss, statistics = self.supervised_loss(part)
            classifier.backward(loss)
            return statistics

        statistics = summed([learn(part) for part in classifier.micro_batches(inputs)])
        return statistics | {"grad_norm_D": classifier.step(inputs.rates("D"))}

    def supervised_loss(self, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of labelled images, flipped and shifted, and statistics; each ()."""
        batch = inputs.batch
        assert batch.labelled is not None
        labels = batch.labelled.labels
        # Always, whatever the augmentation of the discriminator is: few labels are seen many times.
        images = flip_and_shift(batch.labelled.images, inputs.noise["labelled augmentation"])
        with self.precision.autocast():
            # Through the wrapper, so that this forward's gradients are averaged with the others'.
            logits = self.discriminator.model.ddp_module(images, classes=True)
        num_correct = (logits.argmax(1) == labels).float().sum()
        loss = cross_entropy(logits, labels, reduction="sum") * batch.loss_weight
        accuracy = num_correct * batch.loss_weight
        return loss, {"cross_entropy": loss.detach(), "accuracy": accuracy}

    def update_generator(self, inputs: StepInputs, variant: StepVariant) -> dict[str, Tensor]:
        """One update of the generator on the squared distance of mean features.

        Each rank differentiates its own images' part in the global mean, so that the gradient that
        DDP averages is that of the distance.
        """
        orthogonal = self.config.penalty.orthogonal / len(inputs.micro_batches)
        for part in self.generator.micro_batches(inputs):
            fake_mean = self._fake_mean(part, self.generator.ddp_module)
            if part is inputs.micro_batches[0]:
                difference = self._difference(inputs, fake_mean.detach())
            # The gradient of ||m||^2 is 2 m dm: m is a constant of the global batch here, and only
            # this part of dm is differentiated.
            loss = 2 * (difference @ fake_mean)
            self.generator.backward(loss + orthogonal_loss(self.generator.module, orthogonal))
        return {
            "loss_G": difference.square().sum(),
            "grad_norm_G": self.generator.step(inputs.rates("G")),
        }

    @torch.no_grad()
    def _difference(self, inputs: StepInputs, first_fake_mean: Tensor) -> Tensor:
        """Mean features of fake images minus those of real ones, (C,), of the global batch."""
        # All of the batch goes into the first part's loss already. That part's forward is kept for
        # its backward; the others are forwarded here without one, and later once more.
        generator, parts = self.generator.module, inputs.micro_batches
        fake = [first_fake_mean, *(self._fake_mean(part, generator) for part in parts[1:])]
        real = [self._mean_features(part, "G real", part.batch.real_images) for part in parts]
        local = torch.stack(fake).sum(0) - torch.stack(real).sum(0)
        return sum_over_ranks(local) / self.world_size

    def _fake_mean(self, inputs: StepInputs, generator: nn.Module) -> Tensor:
        """(C,), of fake images."""
        with self.precision.autocast():
            fake_images = generator(inputs.noise["G z"])
        return self._mean_features(inputs, "G fake", fake_images)

    def _mean_features(self, inputs: StepInputs, purpose: str, images: Tensor) -> Tensor:
        """(C,), of some images; summed over parts and averaged over ranks those of the batch."""
        classifier = self.discriminator.model.module
        assert isinstance(classifier, ClassifyingDiscriminator)
        with self.precision.autocast(), frozen(classifier):
            # Augmented as in the discriminator's phase: it knows only such images.
            features = classifier.features(self.discriminator.augment(inputs, purpose, images))
        return features.float().sum(0) * inputs.batch.loss_weight
