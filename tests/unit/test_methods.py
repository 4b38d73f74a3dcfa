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
from ganscale.generation.latents import StepRandomness
from ganscale.models import build_classifier
from ganscale.models.autoencoder import Autoencoder, sampled
from ganscale.models.classifying import ClassifyingDiscriminator
from ganscale.objectives.reconstruction import gaussian_kl, gaussian_nll
from ganscale.training.adversarial_step import Shown, discriminator_phase
from ganscale.training.build import build_state, load_shards
from ganscale.training.labelled import LabelledPool, labelled_samples
from ganscale.training.loop import Trainer
from ganscale.training.methods.bigan import Bigan
from ganscale.training.methods.semi_supervised import SemiSupervised
from ganscale.training.methods.vae import Vae
from ganscale.training.precision import Precision
from ganscale.training.share import Labelled, Moment, Share
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.small_models import SMALL_MODELS

CPU = torch.device("cpu")
FP32 = Precision.resolve("fp32", CPU)
BATCH_SIZE = 8
CLASSES = {**SMALL_MODELS["dcgan"], "img_channels": 3, "num_classes": 10}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(World()):
        yield


def started(method: dict[str, Any], model: dict[str, Any] | None = None) -> tuple[Any, Share]:
    """A method with weights that are not those of an initialisation, and a batch of eight."""
    config = Config(
        model=model or SMALL_MODELS["dcgan"],
        method=method,
        training={"batch_size": BATCH_SIZE, "precision": "fp32"},
    )
    found = build_state(config, FP32, World()).method
    torch.manual_seed(3)
    for player in found.players.values():
        for parameter in player.module.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    images = torch.rand(BATCH_SIZE, 3, 16, 16) * 2 - 1
    random = StepRandomness(0, 0, BATCH_SIZE, torch.arange(BATCH_SIZE), CPU)
    labelled = Labelled(images.flip(0), torch.arange(BATCH_SIZE))
    return found, Share(images, None, random, config.model.z_dim, 1 / BATCH_SIZE, labelled)


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
    vae, share = started({"name": "vae", "beta": 0.3})
    assert isinstance(vae, Vae)
    seen = vae.phase(share)
    noise = share.random.normal("posterior", share.z_dim)
    made = vae.player.module(share.real_images, noise)
    error = (made.images.double() - share.real_images.double()).square().mean()
    normal = torch.distributions.Normal(made.images.double(), error.sqrt())
    posterior = torch.distributions.Normal(made.mean, torch.exp(made.log_variance / 2))
    prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    divergence = torch.distributions.kl_divergence(posterior, prior).sum(1).mean().item()
    nll = -normal.log_prob(share.real_images.double()).mean().item()
    assert seen["kl"].item() == pytest.approx(divergence, rel=1e-5)
    assert seen["loss_G"].item() == pytest.approx(nll + 0.3 * divergence / 768, rel=1e-5)


def test_what_is_decoded_to_fool_teaches_the_encoder_nothing() -> None:
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


def test_encoder_and_generator_of_a_bigan_fool_from_both_sides() -> None:
    bigan, share = started({"name": "bigan"})
    assert isinstance(bigan, Bigan)
    judge = bigan.opponent.player.module.eval()  # spectral norm stands still
    found = bigan.generator_phase(share, bigan.opponent.rules(Moment()))
    noise = share.random.normal("G posterior", share.z_dim)
    z = share.random.normal("G z", share.z_dim)
    encoded, made = bigan.player.module(share.real_images, noise, z)
    real, fake = judge(share.real_images, encoded), judge(made, z)
    expected = nn.functional.softplus(-fake) + nn.functional.softplus(real)
    torch.testing.assert_close(found, expected.mean())
    gradients = [p.grad for p in bigan.player.module.parameters()]
    assert all(g is not None and g.norm() > 0 for g in gradients)


def test_being_real_is_to_be_of_some_class_and_not_the_one_of_fakes() -> None:
    torch.manual_seed(0)
    classifier = build_classifier(CLASSES)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    classes = classifier(images, classes=True)
    whole = torch.cat([classes, torch.zeros(5, 1)], dim=1).softmax(1)
    torch.testing.assert_close(torch.sigmoid(classifier(images)), 1 - whole[:, -1])


def test_the_generator_matches_mean_features() -> None:
    method, share = started({"name": "semi-supervised", "labels": 20}, CLASSES)
    assert isinstance(method, SemiSupervised)
    found = method.generator_phase(share, method.opponent.rules(Moment()))
    gradients = [p.grad for p in method.generator.module.parameters()]
    method.generator.optimizer.zero_grad()

    classifier = method.opponent.player.module
    assert isinstance(classifier, ClassifyingDiscriminator)
    made = method.generator.module(share.random.normal("G z", share.z_dim))
    apart = classifier.features(made).mean(0) - classifier.features(share.real_images).mean(0)
    loss = apart.square().sum()
    loss.backward()
    torch.testing.assert_close(found, loss.detach())
    for mine, parameter in zip(gradients, method.generator.module.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-7)


def test_labels_are_learnt_by_cross_entropy_beside_the_game() -> None:
    method, share = started({"name": "semi-supervised", "labels": 20}, CLASSES)
    assert isinstance(method, SemiSupervised)
    loss, accuracy = method.supervised(share)
    assert share.labelled is not None
    # A batch without its augmentation: the loss is near that of the images as they are.
    logits = method.opponent.player.module(share.labelled.images, classes=True)
    chosen = logits.log_softmax(1)[torch.arange(BATCH_SIZE), share.labelled.labels]
    assert loss.item() == pytest.approx(-chosen.mean().item(), rel=0.2)
    assert 0 <= accuracy <= 1

    method, share = started({"name": "semi-supervised", "labels": 20}, CLASSES)
    found = {}
    for name, also in (("game", 0.0), ("both", method.supervised(share)[0])):
        rules = method.opponent.rules(Moment())
        real, fake = share.real_images, torch.zeros_like(share.real_images)
        player = method.opponent.player
        discriminator_phase(player, rules, share, Shown(real), Shown(fake), also=also)
        found[name] = torch.cat([p.grad.flatten() for p in player.module.parameters()])
        player.optimizer.zero_grad()
    method.supervised(share)[0].backward()
    alone = torch.cat([p.grad.flatten() for p in player.module.parameters()])
    torch.testing.assert_close(found["both"] - found["game"], alone, rtol=1e-3, atol=1e-5)


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
        return pool.draw(StepRandomness(5, 640, 9, slots, CPU))

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
    share = trainer._share(trainer.reader.read(0, config.training.batch_size))
    trainer.close()
    assert share.labels is None
    assert share.labelled is not None
    assert len(share.labelled.labels) == config.training.batch_size
