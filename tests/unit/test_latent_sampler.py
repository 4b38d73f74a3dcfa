"""Truncation of latents and of styles, and styles that are given by layer."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from ganscale.config.models import DcganModel, Stylegan2Model
from ganscale.data.values import ValueRange
from ganscale.errors import ConfigError
from ganscale.generation.latent_sampler import (
    LatentSampler,
    mixed_images,
    truncated_latents,
    truncated_styles,
)
from ganscale.generation.latents import seeded_latents
from ganscale.generation.sampler import SampleableGenerator, diversity
from ganscale.models import build_generator


def generator_of(model: DcganModel | Stylegan2Model) -> SampleableGenerator:
    spec = model.model_dump()
    torch.manual_seed(0)
    return SampleableGenerator(build_generator(spec), spec=spec, info={"model": spec})


STYLES = Stylegan2Model(z_dim=16, base_channels=16)
CLASSES = Stylegan2Model(z_dim=16, base_channels=16, num_classes=3)


def test_truncated_latents_follow_the_truncated_normal() -> None:
    z = truncated_latents(list(range(200)), 100, threshold=0.8)
    assert float(z.abs().max()) <= 0.8
    assert stats.kstest(z.flatten().numpy(), stats.truncnorm(-0.8, 0.8).cdf).pvalue > 0.01


def test_elements_within_the_threshold_stay() -> None:
    free, cut = seeded_latents([5], 100), truncated_latents([5], 100, threshold=1.0)
    inside = free.abs() <= 1
    assert torch.equal(cut[inside], free[inside])
    assert torch.equal(truncated_latents([5], 100, threshold=9.0), free)


def test_a_seeds_truncated_latent_does_not_depend_on_the_others() -> None:
    both = truncated_latents([1, 2], 8, threshold=0.5)
    assert torch.equal(both[1:], truncated_latents([2], 8, threshold=0.5))


def test_styles_are_pulled_towards_their_mean() -> None:
    w, mean = torch.tensor([[1.0, 5.0]]), torch.tensor([3.0, 1.0])
    assert truncated_styles(w, mean, 0.0).tolist() == [[3, 1]]
    assert truncated_styles(w, mean, 1.0).tolist() == [[1, 5]]
    assert truncated_styles(w, mean, 0.5).tolist() == [[2, 3]]


def test_the_mean_over_all_classes_is_not_that_of_the_first() -> None:
    z, first = seeded_latents([0], 16), torch.tensor([[1.0, 0.0, 0.0]])
    fresh = LatentSampler(generator_of(CLASSES), truncation_psi=0.0)
    other = LatentSampler(generator_of(CLASSES), truncation_psi=0.0)
    of_all = other.styles(z)
    assert torch.equal(other.styles(z, first), fresh.styles(z, first))
    assert not torch.allclose(of_all, other.styles(z, first))


def test_the_mean_style_is_that_of_many_latents() -> None:
    generator = generator_of(STYLES)
    w = LatentSampler(generator).styles(seeded_latents(list(range(1024)), 16))
    mean = LatentSampler(generator, truncation_psi=0.0).styles(seeded_latents([7], 16))
    torch.testing.assert_close(mean[0], w.mean(0))


@pytest.mark.parametrize("model", [STYLES, CLASSES])
def test_images_grow_alike_with_less_psi_and_themselves_at_one(model: Stylegan2Model) -> None:
    generator = generator_of(model)
    seeds = list(range(8))
    drawn = {
        psi: LatentSampler(generator, truncation_psi=psi).sample_seeds(seeds, label=label)
        for label in [1 if model.num_classes else None]
        for psi in (0.0, 0.5, 1.0)
    }
    own = generator.sample_seeds(seeds, label=1 if model.num_classes else None)
    assert int((drawn[1.0].int() - own.int()).abs().max()) <= 1
    assert diversity(drawn[0.0]) == 0
    assert diversity(drawn[0.5]) < diversity(own)


def test_styles_given_by_layer_are_those_of_the_layers() -> None:
    sampler = LatentSampler(generator_of(STYLES))
    rows, columns = [0, 1], [2, 3, 4]
    assert sampler.num_layers == 8
    last = mixed_images(sampler, rows, columns, 8)
    first = mixed_images(sampler, rows, columns, 0)
    for column in range(3):
        assert torch.equal(last[:, column], sampler.sample_seeds(rows))
    for row in range(2):
        assert torch.equal(first[row], sampler.sample_seeds(columns))
    middle = mixed_images(sampler, rows, columns, 3)
    assert not torch.equal(middle, first)
    assert not torch.equal(middle, last)


@pytest.mark.parametrize("psi", [None, 0.5])
def test_images_leave_the_device_forward_by_forward(
    psi: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are converted before they are joined."""
    converted: list[int] = []
    from_network = ValueRange.from_network

    def counted(self: ValueRange, images: torch.Tensor) -> torch.Tensor:
        converted.append(len(images))
        return from_network(self, images)

    generator = generator_of(STYLES)
    sampler = LatentSampler(generator, truncation_psi=psi)
    last = sampler.sample_seeds([39])
    monkeypatch.setattr(ValueRange, "from_network", counted)
    images = sampler.sample_seeds(list(range(40)))
    assert converted == [16, 16, 8]
    assert torch.equal(images[39:], last)


def test_errors_say_what_is_taken() -> None:
    latents = generator_of(DcganModel(z_dim=16, base_channels=8))
    with pytest.raises(ConfigError, match="at least 0.05"):
        LatentSampler(latents, truncation_psi=0.0).sample_seeds([0])
    with pytest.raises(ConfigError, match="takes 0 to 1"):
        LatentSampler(generator_of(STYLES), truncation_psi=1.5)
    with pytest.raises(ConfigError, match="dcgan has no styles w"):
        mixed_images(LatentSampler(latents), [0], [1], 2)
    with pytest.raises(ConfigError, match="layers 0 to 8"):
        mixed_images(LatentSampler(generator_of(STYLES)), [0], [1], 9)
