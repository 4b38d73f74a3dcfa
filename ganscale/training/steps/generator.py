"""The generator's phase: forward, loss against the discriminator, backward, update.

`generator_loss` is also that of the methods whose fakes come from elsewhere: an encoder and a
generator, pairs of images and latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ganscale.training.collectives import kth_largest
from ganscale.training.optimized_model import OptimizedModel
from ganscale.training.step_inputs import StepInputs
from ganscale.training.steps.adversarial_schedules import uses_top_k
from ganscale.training.steps.discriminator import (
    DiscriminatorTrainer,
    Samples,
    center_logits,
    frozen,
    orthogonal_loss,
    real_and_fake,
)
from ganscale.training.steps.statistics import summed


def update_generator(
    generator: OptimizedModel,
    discriminator: DiscriminatorTrainer,
    inputs: StepInputs,
    fake_images: Tensor | None = None,
) -> dict[str, Tensor]:
    """One update of a generator(z, labels); returns statistics, each ().

    `fake_images` (n, C, H, W) are of a forward of all inputs through `generator.ddp_module`; None
    draws new ones, those of one micro-batch at a time.
    """
    assert fake_images is None or len(inputs.micro_batches) == 1, "combinations.py refuses it"
    # Each micro-batch takes an equal part of the penalty on the weights.
    orthogonal = discriminator.config.penalty.orthogonal / len(inputs.micro_batches)

    def learn(part: StepInputs) -> dict[str, Tensor]:
        # Forward.
        images = fake_images
        if images is None:
            with discriminator.precision.autocast():
                images = generator.ddp_module(part.noise["G z"], part.batch.labels)

        # Loss.
        real, fake = real_and_fake(part.batch, images)
        loss = generator_loss(discriminator, part, real, fake)

        # Penalty and backward; DDP averages the gradients over the ranks.
        generator.backward(loss + orthogonal_loss(generator.module, orthogonal))
        return {"loss_G": loss.detach()}

    # Update.
    statistics = summed([learn(part) for part in generator.micro_batches(inputs)])
    return statistics | {"grad_norm_G": generator.step(inputs.rates("G"))}


def generator_loss(
    discriminator: DiscriminatorTrainer,
    inputs: StepInputs,
    real: Samples,
    fake: Samples,
    *,
    real_learns: bool = False,
) -> Tensor:
    """The adversarial loss of whoever made the fakes, (); the discriminator gets no gradients.

    Averaged over ranks it is the mean over the global batch. With `real_learns` the condition of
    the real images learns too, to be taken for that of fakes. Otherwise real images are judged for
    relativistic objectives only, which compare with them.
    """
    batch, objective = inputs.batch, discriminator.objective
    real_logits = None
    with discriminator.precision.autocast(), frozen(discriminator.model.module):
        # Most losses of a generator do not look at real logits; their forward is saved.
        if objective.generator_sees_real or real_learns:
            real_logits_fn = discriminator.logits_fn(inputs, "G real", real.condition, learns=False)
            real_logits = real_logits_fn(real.images)
            # Detached, since gradient normalisation makes logits a function of images that ask for
            # a gradient of their own.
            real_logits = real_logits if real_learns else real_logits.detach()
        fake_logits_fn = discriminator.logits_fn(inputs, "G fake", fake.condition, learns=False)
        fake_logits = fake_logits_fn(fake.images)
        if real_logits is not None:
            real_logits, fake_logits = center_logits(objective, batch, real_logits, fake_logits)
        loss = objective.generator(real_logits, fake_logits)
        # An encoder wants its real pairs to pass for fakes. Turning the sign of a logit swaps the
        # sides, so this is the generator's loss seen from there. Relativistic losses, a function of
        # the difference, have done both in one already.
        if real_learns and real_logits is not None and not objective.generator_sees_real:
            loss = loss + objective.generator(None, -real_logits)
        # Weights multiply the loss after centring: which samples count is chosen by the logits, but
        # what they are compared with stays the mean of all.
        if uses_top_k(discriminator.config):
            loss = loss * top_k_weights(inputs, fake_logits)
        return loss.sum() * batch.loss_weight


def top_k_weights(inputs: StepInputs, fake_logits: Tensor) -> Tensor:
    """Weights of the generator's samples, (n,): B / k for the k best of the global batch, else 0.

    Sinha et al. (2020, arXiv 2002.06224).
    """
    logits = fake_logits.detach().float()
    # "The k best" is a statement about the global batch, so the ranks' logits are put into one
    # table. Every rank fills its own places, and the maximum over ranks fills the others.
    table = inputs.batch.in_global_batch(logits, fill=-torch.inf)
    threshold = kth_largest(table, inputs.schedules["top_k"])
    # Logits that tie with the k-th are all kept, though the scale counts k of them.
    return (logits >= threshold) * inputs.schedules["top_k_scale"]
