"""What the methods other than the plain GAN minimise, against closed forms and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ganscale.config import Config
from ganscale.data.reader import ShardImages
from ganscale.data.shards import ShardSet
from ganscale.errors import ConfigError
from ganscale.generation.latents import draw_noise, uniform
from ganscale.models import build_classifier
from ganscale.models.autoencoder import Autoencoder, sampled
from ganscale.models.classifying import ClassifyingDiscriminator
from ganscale.training.build import build_state, load_shards
from ganscale.training.labelled import LabelledPool, labelled_samples
from ganscale.training.loop import Trainer
from ganscale.training.precision import Precision
from ganscale.training.step_inputs import Labelled, LocalBatch
from ganscale.training.steps.bigan import Bigan
from ganscale.training.steps.discriminator import Samples
from ganscale.training.steps.likelihood import gaussian_kl, gaussian_nll
from ganscale.training.steps.semi_supervised import SemiSupervised
from ganscale.training.steps.vae import Vae
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.small_models import SMALL_MODELS
from tests.support.steps import (
    local_batch,
    next_inputs,
    recorded_gradients,
    step_inputs,
)

CPU = torch.device("cpu")
FP32 = Precision.resolve("fp32", CPU)
BATCH_SIZE = 8
CLASSES = {**SMALL_MODELS["dcgan"], "img_channels": 3, "num_classes": 10}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(World()):
        yield


def method_and_batch(
    method: dict[str, Any], model: dict[str, Any] | None = None
) -> tuple[Any, LocalBatch]:
    """A method with weights that are not those of an initialisation, and a batch of eight."""
    config = Config(
        model=model or SMALL_MODELS["dcgan"],
        method=method,
        training={"batch_size": BATCH_SIZE, "precision": "fp32"},
    )
    built = build_state(config, FP32, World()).method
    torch.manual_seed(3)
    for network in built.models.values():
        for parameter in network.module.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    images = torch.rand(BATCH_SIZE, 3, 16, 16) * 2 - 1
    labelled = Labelled(images.flip(0), torch.arange(BATCH_SIZE))
    return built, local_batch(images, labelled=labelled)


def test_the_divergence_is_that_of_torch_distributions() -> None:
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 7, 5, dtype=torch.float64)
    posterior = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(posterior, prior).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, log_variance), expected, rtol=1e-12, atol=0)


def test_the_divergence_of_the_prior_from_itself_is_nothing() -> None:
    assert gaussian_kl(torch.zeros(3, 4), torch.zeros(3, 4)).tolist() == [0, 0, 0]


def test_the_likelihood_is_that_of_torch_distributions() -> None:
    torch.manual_seed(0)
    wanted, made = torch.randn(2, 6, 11, dtype=torch.float64)
    variance = torch.tensor(0.37, dtype=torch.float64)
    expected = -torch.distributions.Normal(made, variance.sqrt()).log_prob(wanted).mean()
    found = gaussian_nll((made - wanted).square().mean(), variance)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_variance_that_is_taken_is_the_most_likely_one() -> None:
    error = torch.tensor(0.21, dtype=torch.float64)
    best = gaussian_nll(error, error)
    assert all(gaussian_nll(error, factor * error) > best for factor in (0.9, 0.99, 1.01, 1.1))


def test_latents_are_drawn_with_mean_and_variance_of_the_posterior() -> None:
    torch.manual_seed(0)
    mean, log_variance = torch.tensor([[0.5, -2.0]]), torch.tensor([[0.2, -1.0]])
    z = sampled(mean, log_variance, torch.randn(200_000, 2))
    torch.testing.assert_close(z.mean(0), mean[0], rtol=0, atol=0.01)
    torch.testing.assert_close(z.var(0), torch.exp(log_variance[0]), rtol=0.02, atol=0)


def test_the_loss_of_a_vae_is_the_negative_bound_per_dimension() -> None:
    vae, batch = method_and_batch({"name": "vae", "beta": 0.3})
    assert isinstance(vae, Vae)
    inputs, variant = step_inputs(vae, batch)
    made = vae.autoencoder.module(batch.real_images, inputs.noise["posterior"])
    statistics = vae.update(inputs, variant)
    error = (made.images.double() - batch.real_images.double()).square().mean()
    normal = torch.distributions.Normal(made.images.double(), error.sqrt())
    posterior = torch.distributions.Normal(made.mean, torch.exp(made.log_variance / 2))
    prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    divergence = torch.distributions.kl_divergence(posterior, prior).sum(1).mean().item()
    nll = -normal.log_prob(batch.real_images.double()).mean().item()
    assert statistics["kl"].item() == pytest.approx(divergence, rel=1e-5)
    assert statistics["loss_G"].item() == pytest.approx(nll + 0.3 * divergence / 768, rel=1e-5)


def test_fakes_give_the_encoder_no_gradient() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))

    class Halves(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            mean, log_variance = encoder(images).chunk(2, dim=1)
            return mean, log_variance

    class Decoder(nn.Linear):
        def forward(self, z: torch.Tensor, labels: object = None) -> torch.Tensor:
            return super().forward(z)

    model = Autoencoder(Halves(), Decoder(2, 3))
    images, noise, prior = torch.rand(6, 3, 2, 2), torch.randn(6, 2), torch.randn(6, 2)
    from_prior = torch.tensor([True, False] * 3)[:, None]
    made = model(images, noise, None, prior, from_prior)
    assert made.fakes is not None
    latents = torch.where(from_prior, prior, sampled(made.mean, made.log_variance, noise))
    torch.testing.assert_close(made.fakes, model.generator(latents))
    made.fakes.sum().backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    made.images.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_encoder_and_generator_of_a_bigan_learn_from_both_sides() -> None:
    bigan, batch = method_and_batch({"name": "bigan"})
    assert isinstance(bigan, Bigan)
    discriminator = bigan.discriminator.model.module.eval()  # spectral norm stands still
    inputs, variant = step_inputs(bigan, batch)
    noise = inputs.noise
    encoded, made = bigan.generator.module(batch.real_images, noise["G posterior"], noise["G z"])
    real, fake = discriminator(batch.real_images, encoded), discriminator(made, noise["G z"])
    expected = nn.functional.softplus(-fake) + nn.functional.softplus(real)
    with recorded_gradients(bigan.generator) as gradients:
        statistics = bigan.update_generator(inputs, variant)
    torch.testing.assert_close(statistics["loss_G"], expected.mean())
    assert len(gradients) == len(list(bigan.generator.module.parameters()))
    assert all(gradient.norm() > 0 for gradient in gradients)


def test_being_real_is_to_be_of_some_class_and_not_the_one_of_fakes() -> None:
    torch.manual_seed(0)
    classifier = build_classifier(CLASSES)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    classes = classifier(images, classes=True)
    whole = torch.cat([classes, torch.zeros(5, 1)], dim=1).softmax(1)
    torch.testing.assert_close(torch.sigmoid(classifier(images)), 1 - whole[:, -1])


def test_the_generator_matches_mean_features() -> None:
    method, batch = method_and_batch({"name": "semi-supervised", "labels": 20}, CLASSES)
    assert isinstance(method, SemiSupervised)
    inputs, variant = step_inputs(method, batch)
    classifier = method.discriminator.model.module
    assert isinstance(classifier, ClassifyingDiscriminator)
    made = method.generator.module(inputs.noise["G z"])
    apart = classifier.features(made).mean(0) - classifier.features(batch.real_images).mean(0)
    loss = apart.square().sum()
    expected = torch.autograd.grad(loss, list(method.generator.module.parameters()))
    with recorded_gradients(method.generator) as gradients:
        statistics = method.update_generator(inputs, variant)
    torch.testing.assert_close(statistics["loss_G"], loss.detach())
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_labels_are_learnt_by_cross_entropy_beside_the_adversarial_loss() -> None:
    method, batch = method_and_batch({"name": "semi-supervised", "labels": 20}, CLASSES)
    assert isinstance(method, SemiSupervised)
    inputs, variant = step_inputs(method, batch)
    loss, statistics = method.supervised_loss(inputs)
    assert batch.labelled is not None
    # The images are flipped and shifted: the loss is near that of the images as they are.
    logits = method.discriminator.model.module(batch.labelled.images, classes=True)
    chosen = logits.log_softmax(1)[torch.arange(BATCH_SIZE), batch.labelled.labels]
    assert loss.item() == pytest.approx(-chosen.mean().item(), rel=0.2)
    assert 0 <= statistics["accuracy"] <= 1

    parameters = list(method.discriminator.model.module.parameters())
    alone = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    gradients = {}
    for name in ("adversarial", "both"):
        method, batch = method_and_batch({"name": "semi-supervised", "labels": 20}, CLASSES)
        inputs, variant = step_inputs(method, batch)
        real, fake = Samples(batch.real_images), Samples(torch.zeros_like(batch.real_images))
        with recorded_gradients(method.discriminator.model) as recorded:
            method.discriminator.update(
                inputs,
                variant,
                lambda _, samples=(real, fake): samples,
                extra_loss=method.supervised_loss if name == "both" else None,
            )
        gradients[name] = torch.cat([g.flatten() for g in recorded])
    difference = gradients["both"] - gradients["adversarial"]
    torch.testing.assert_close(difference, alone, rtol=1e-3, atol=1e-5)


def test_labelled_samples_are_as_many_of_each_class(procedural_shards: Any) -> None:
    shard_set = ShardSet.load(str(procedural_shards))
    samples = labelled_samples(shard_set, 40, seed=1)
    labels = shard_set.samples["label"][samples]
    assert len(set(samples.tolist())) == 40
    assert np.bincount(labels).tolist() == [4] * 10
    assert labelled_samples(shard_set, 40, seed=1).tolist() == samples.tolist()
    assert labelled_samples(shard_set, 40, seed=2).tolist() != samples.tolist()
    with pytest.raises(ConfigError, match="1000 images of each class"):
        labelled_samples(shard_set, 10_000, seed=1)


def test_ranks_together_draw_the_labelled_images_of_one_process(procedural_shards: Any) -> None:
    shard_set = ShardSet.load(str(procedural_shards))
    pool = LabelledPool(shard_set, ShardImages(shard_set), 20, seed=1, device=CPU)

    def drawn(slots: torch.Tensor) -> Labelled:
        draws = {"labelled": uniform(1)}
        noise = draw_noise(draws, seed=5, position=640, batch_size=9, slots=slots)
        return pool.pick(noise["labelled"])

    whole = drawn(torch.arange(9))
    chosen = labelled_samples(shard_set, 20, seed=1)
    pixels = ShardImages(shard_set).read(chosen).pixels.float() / 127.5 - 1
    labels = shard_set.samples["label"][chosen]
    for image, label in zip(whole.images, whole.labels, strict=True):
        (place,) = [n for n, found in enumerate(pixels) if torch.equal(found, image)]
        assert labels[place] == label
    for rank in range(2):
        slots = torch.arange(rank, 9, 2)
        part = drawn(slots)
        assert torch.equal(part.images, whole.images[slots])
        assert torch.equal(part.labels, whole.labels[slots])


def test_the_labels_of_the_other_images_are_kept_from_it(make_config: MakeConfig) -> None:
    config = make_config(
        method={"name": "semi-supervised", "labels": 20}, model={"num_classes": 10, "z_dim": 16}
    )
    trainer = Trainer(config, World(), load_shards(config))
    batch = trainer.inputs.unpack(next_inputs(trainer).packed).batch
    trainer.close()
    assert batch.labels is None
    assert batch.labelled is not None
    assert len(batch.labelled.labels) == config.training.batch_size
