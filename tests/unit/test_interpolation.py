"""Paths between latents: closed forms, ends, speed and lengths."""

from __future__ import annotations

import math

import pytest
import torch

from ganscale.config.models import BigganModel, DcganModel, R3ganModel, SnganModel, Stylegan2Model
from ganscale.errors import ConfigError
from ganscale.generation.interpolation import class_frames, frames_between, lerp, path, slerp
from ganscale.generation.latent_sampler import LatentSampler
from ganscale.generation.sampler import SampleableGenerator
from ganscale.models import build_generator

CLASSES = [
    SnganModel(z_dim=16, base_channels=8, num_classes=3),
    BigganModel(z_dim=16, base_channels=8, num_classes=3),
    R3ganModel(z_dim=16, base_channels=16, num_classes=3, blocks_per_stage=1),
    Stylegan2Model(z_dim=16, base_channels=16, num_classes=3),
]


def explorer_of(
    model: DcganModel | SnganModel | BigganModel | R3ganModel | Stylegan2Model,
) -> LatentSampler:
    spec = model.model_dump()
    torch.manual_seed(0)
    generator = build_generator(spec)
    for parameter in generator.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # what starts at 0 ignores classes
    return LatentSampler(SampleableGenerator(generator, spec=spec, info={"model": spec}))


def two(d: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, d, dtype=torch.float64, generator=random)
    return a, b


def test_slerp_is_shoemakes_formula_on_the_sphere() -> None:
    a, b = (x / x.norm() for x in two())
    angle = torch.arccos(a @ b)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    expected = torch.sin((1 - t) * angle)[:, None] * a + torch.sin(t * angle)[:, None] * b
    torch.testing.assert_close(slerp(a, b, t), expected / torch.sin(angle))


def test_slerp_turns_at_constant_speed_and_its_length_changes_linearly() -> None:
    a, b = two()
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    way = slerp(a, 3 * b, t)
    unit = way / way.norm(dim=1, keepdim=True)
    turns = torch.arccos((unit[1:] * unit[:-1]).sum(1))
    torch.testing.assert_close(turns, turns[:1].expand(10))
    torch.testing.assert_close(way.norm(dim=1), (1 - t) * a.norm() + t * 3 * b.norm())


@pytest.mark.parametrize("mix", [lerp, slerp])
def test_ends_are_exact(mix: object) -> None:
    a, b = two(100)
    assert callable(mix)
    assert torch.equal(mix(a, b, torch.tensor(0.0)), a)
    assert torch.equal(mix(a, b, torch.tensor(1.0)), b)


def test_slerp_of_parallel_and_opposite_vectors_keeps_the_length() -> None:
    a, _ = two()
    half = torch.tensor(0.5)
    torch.testing.assert_close(slerp(a, a, half), a)
    torch.testing.assert_close(slerp(a, a * (1 + 1e-15), half), a)
    torch.testing.assert_close(slerp(a, 2 * a, half), 1.5 * a)
    middle = slerp(a, -a, half)
    torch.testing.assert_close(middle.norm(), a.norm())
    assert abs(float(middle @ a)) < 1e-12
    assert torch.equal(slerp(a, 0 * a, half), a / 2)


def test_slerp_treats_each_vector_by_itself() -> None:
    a, b = torch.randn(2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one_by_one = [slerp(*row) for row in zip(a, b, t, strict=True)]
    torch.testing.assert_close(slerp(a, b, t), torch.stack(one_by_one))
    ninety = slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor(0.5))
    torch.testing.assert_close(ninety, torch.full((2,), math.sqrt(0.5)))


def test_a_path_passes_its_points_and_may_close() -> None:
    points = torch.tensor([[0.0], [4.0], [8.0]])
    assert path(points, 2, mix=lerp).flatten().tolist() == [0, 2, 4, 6, 8]
    assert path(points, 2, mix=lerp, loop=True).flatten().tolist() == [0, 2, 4, 6, 8, 4]
    with pytest.raises(ConfigError, match="2 points and 1 frame, got 1 and 2"):
        path(points[:1], 2, mix=lerp)


@pytest.mark.parametrize("model", [DcganModel(z_dim=16, base_channels=8), *CLASSES])
def test_ends_of_a_strip_are_the_seeds_own_images(model: DcganModel) -> None:
    sampler = explorer_of(model)
    frames = frames_between(sampler, [3, 9], 17)
    assert frames.shape == (18, 3, 32, 32)
    assert torch.equal(frames[[0, -1]], sampler.generator.sample_seeds([3, 9]))


@pytest.mark.parametrize("model", CLASSES)
def test_classes_are_mixed_where_they_are_embedded(model: SnganModel) -> None:
    sampler = explorer_of(model)
    frames = class_frames(sampler, [4, 5], [0, 2], 2)
    assert frames.shape == (2, 3, 3, 32, 32)
    for number, label in ((0, 0), (2, 2)):
        own = sampler.generator.sample_seeds([4, 5], label=label)
        assert torch.equal(frames[:, number], own)
    assert not torch.equal(frames[:, 1], frames[:, 0])
    assert not torch.equal(frames[:, 1], frames[:, 2])


def test_without_classes_there_are_none_to_mix() -> None:
    with pytest.raises(ConfigError, match="has no classes"):
        class_frames(explorer_of(DcganModel(z_dim=16, base_channels=8)), [0], [0, 1], 2)
