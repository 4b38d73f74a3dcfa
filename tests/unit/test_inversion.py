"""Inversion of generators whose answer is known: linear ones, by least squares in numpy."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ganscale.generation.degradations import (
    Degradation,
    build_mask,
    denoise,
    identity,
    inpaint,
    superres,
)
from ganscale.generation.inversion import GROUP, InversionSettings, encode, invert
from ganscale.generation.sampler import SampleableGenerator

SHAPE = (1, 8, 8)
Z_DIM = 6


class Linear(nn.Module):
    """Images W z, and a class's own constant."""

    def __init__(self, num_classes: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(64, Z_DIM, generator=random) / 4)
        self.constants = nn.Parameter(torch.arange(max(num_classes, 1)).float())

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        flat = z @ self.weight.T + self.constants[labels][:, None]
        return flat.view(-1, *SHAPE)


class PseudoInverse(nn.Module):
    """The exact encoder of a linear generator."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.inverse = torch.linalg.pinv(weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z = images.flatten(1) @ self.inverse.T
        return z, torch.zeros_like(z)


def linear(num_classes: int = 0) -> SampleableGenerator:
    spec = {"z_dim": Z_DIM, "num_classes": num_classes, "resolution": 8}
    return SampleableGenerator(Linear(num_classes), spec=spec, info={})


def weight_of(generator: SampleableGenerator) -> Tensor:
    return generator.model.get_parameter("weight").detach()


def any_images(num: int, seed: int = 1) -> Tensor:
    return torch.rand(num, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
@pytest.mark.parametrize(
    "degradation", [identity(), superres(2), inpaint(build_mask("half", 8, 8))]
)
def test_the_latents_are_those_of_least_squares(
    optimizer: Literal["adam", "lbfgs"], degradation: Degradation
) -> None:
    generator, images = linear(), any_images(3)
    search = InversionSettings(optimizer=optimizer, steps=400, restarts=2, pool=64, prior=0.0)
    found = invert(generator, degradation, degradation.operator(images), search)
    basis = weight_of(generator).T.view(Z_DIM, *SHAPE)
    seen = degradation.operator(basis).flatten(1).T
    wanted = degradation.operator(images).flatten(1).T
    z, *_ = np.linalg.lstsq(seen.numpy(), wanted.numpy(), rcond=None)
    assert_close(found.latents, torch.from_numpy(z.T), rtol=1e-2, atol=1e-2)
    errors = ((seen.numpy() @ z - wanted.numpy()) ** 2).mean(0)
    assert_close(found.misfits, torch.from_numpy(errors), rtol=1e-3, atol=1e-6)


def test_the_prior_gives_ridge_regression() -> None:
    generator, images = linear(), any_images(2)
    prior = 0.5
    found = invert(generator, denoise(0.1), images, InversionSettings(steps=50, prior=prior))
    w = weight_of(generator).double().numpy()
    # mean over 64 pixels of (W z - x)^2 + prior times the mean over z.
    normal = w.T @ w / 64 + prior * np.eye(Z_DIM) / Z_DIM
    wanted = np.linalg.solve(normal, w.T @ images.flatten(1).double().numpy().T / 64)
    assert_close(found.latents, torch.from_numpy(wanted.T).float(), rtol=1e-3, atol=1e-4)


def test_a_latent_is_kept_probable_where_the_image_is_open() -> None:
    generator, images = linear(), any_images(2)
    half = inpaint(build_mask("half", 8, 8))
    seen = half.observe(images, [0, 1])

    def latents(prior: float | None) -> Tensor:
        return invert(
            generator, half, seen, InversionSettings(steps=20, pool=64, prior=prior)
        ).latents

    assert torch.equal(latents(None), latents(0.01))
    assert (latents(None).square().mean(1) < latents(0.0).square().mean(1)).all()


def test_an_image_does_not_depend_on_the_others() -> None:
    generator, images = linear(), any_images(GROUP + 3)
    search = InversionSettings(steps=15, pool=64)
    whole = invert(generator, identity(), images, search)
    part = invert(generator, identity(), images[GROUP + 1 : GROUP + 2], search)
    assert whole.latents.shape == (GROUP + 3, Z_DIM)
    assert torch.equal(part.latents, whole.latents[GROUP + 1 : GROUP + 2])


def test_classes_are_found_or_taken() -> None:
    generator = linear(num_classes=4)
    z = torch.randn(4, Z_DIM, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1, 2, 3])
    images = generator.model(z, labels)
    # 16 random starts of four classes: each has its best one among the four nearest.
    found = invert(generator, identity(), images, InversionSettings(steps=50, restarts=8, pool=256))
    assert torch.equal(found.labels, labels)
    assert_close(found.latents, z, rtol=1e-2, atol=1e-2)
    wrong = labels.flip(0)
    given = invert(generator, identity(), images, InversionSettings(steps=20), labels=wrong)
    assert torch.equal(given.labels, wrong)
    assert (given.misfits > found.misfits).all()


def test_the_encoder_is_a_start() -> None:
    generator = linear()
    encoder = PseudoInverse(weight_of(generator))
    images = generator.model(3 * torch.ones(2, Z_DIM), torch.zeros(2, dtype=torch.int64))
    search = InversionSettings(steps=1, restarts=2, pool=64, optimizer="adam", lr=1e-6)
    without = invert(generator, identity(), images, search)
    with_it = invert(generator, identity(), images, search, encoder=encoder)
    assert (without.misfits > 0.01).all()
    assert_close(with_it.misfits, torch.zeros(2), rtol=0, atol=1e-6)


def test_an_encoder_alone_decodes_the_trivial_reconstruction() -> None:
    generator = linear()
    encoder = PseudoInverse(weight_of(generator))
    images = any_images(GROUP + 2)
    degradation = superres(2)
    observed = degradation.operator(images)
    found = encode(generator, encoder, degradation, observed)
    z, _ = encoder(degradation.fill(observed))
    assert_close(found.latents, z)
    assert_close(found.images, generator.model(z, torch.zeros(len(z), dtype=torch.int64)))


def test_tuning_goes_on_where_latents_end_and_leaves_the_generator_alone() -> None:
    generator, images = linear(), any_images(2)
    before = copy.deepcopy(generator.model.state_dict())
    search = InversionSettings(steps=20, pool=64, tuning_steps=50, tuning_lr=1e-2)
    told: list[int] = []
    tuned = invert(generator, identity(), images, search, progress=told.append)
    plain = invert(generator, identity(), images, InversionSettings(steps=20, pool=64))
    assert (tuned.misfits < plain.misfits / 2).all()
    assert torch.equal(tuned.latents, plain.latents)
    assert sum(told) == search.num_steps(2) == 20 + 2 * 50
    assert all(
        torch.equal(value, before[key]) for key, value in generator.model.state_dict().items()
    )
