"""Penalties, and their gradients in the weights, against finite differences in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ganscale.config import PenaltyConfig
from ganscale.models.layers import spectral_norm
from ganscale.models.r3gan import R3ganDiscriminator
from ganscale.objectives import penalties
from ganscale.objectives.penalties import (
    DRAGAN_STD,
    FINITE_DIFFERENCE_STEP,
    PENALTIES,
    PenaltyInputs,
    gradient_normalised,
    input_gradient,
    orthogonal_penalty,
)
from tests.support.devices import on_each_device

SHAPE = (3, 2, 3, 3)
STEP = 1e-5


def noise(shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    """What the penalties need for images of this shape, always the same."""
    generator = torch.Generator().manual_seed(5)
    numbers = {name: torch.randn(shape, generator=generator) for name in ("r1", "r2", "dragan")}
    return {**numbers, "wgan_gp": torch.rand(shape[0], 1, 1, 1, generator=generator)}


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def smooth_discriminator() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 1)
    )


def images(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def phase(discriminator: nn.Module, *, real_gradient: bool, fake_gradient: bool) -> PenaltyInputs:
    """A phase in which only the images that a penalty names ask for gradients."""

    def logits_fn(x: Tensor) -> Tensor:
        logits: Tensor = discriminator(x).squeeze(1)
        return logits

    real, fake = images(1).requires_grad_(real_gradient), images(2).requires_grad_(fake_gradient)
    return PenaltyInputs(
        real_logits_fn=logits_fn,
        fake_logits_fn=logits_fn,
        real_images=real,
        fake_images=fake,
        real_logits=logits_fn(real),
        fake_logits=logits_fn(fake),
        noise=noise(),
        perturb=lambda x: x.flip(3),
        anchors=torch.tensor([0.4, -0.7]),
    )


def inputs_for(name: str, discriminator: nn.Module) -> PenaltyInputs:
    entry = PENALTIES[name]
    return phase(
        discriminator, real_gradient=entry.real_gradient, fake_gradient=entry.fake_gradient
    )


def differentiated(function: Callable[[], Tensor], at: Tensor) -> Tensor:
    """d function() / d at, elementwise, by central differences; `function` looks at `at`."""
    flat, slopes = at.detach().view(-1), []
    for place in range(flat.numel()):
        values = []
        for sign in (1, -1):
            flat[place] += sign * STEP
            values.append(function().detach())
            flat[place] -= sign * STEP
        slopes.append((values[0] - values[1]) / (2 * STEP))
    return torch.stack(slopes, dim=-1)


def squared_slopes(discriminator: nn.Module, at: Tensor) -> Tensor:
    """||grad D||^2 of each sample, (n,), from differences of the logits alone."""
    at = at.detach().clone()
    slopes = differentiated(lambda: discriminator(at).squeeze(1), at)  # (n, all elements)
    return slopes.square().sum(dim=1)


def test_gradient_penalties_are_those_of_finite_differences() -> None:
    discriminator = smooth_discriminator()
    between = torch.lerp(images(1), images(2), noise()["wgan_gp"])
    around = images(1) + DRAGAN_STD * noise()["dragan"]
    expected = {
        "r1": squared_slopes(discriminator, images(1)) / 2,
        "r2": squared_slopes(discriminator, images(2)) / 2,
        "wgan_gp": (squared_slopes(discriminator, between).sqrt() - 1).square(),
        "dragan": (squared_slopes(discriminator, around).sqrt() - 1).square(),
    }
    for name, value in expected.items():
        found = PENALTIES[name].value(inputs_for(name, discriminator))
        torch.testing.assert_close(found.detach(), value, rtol=1e-6, atol=0)


def test_penalties_without_gradients_are_their_formulas() -> None:
    discriminator = smooth_discriminator()
    logits: dict[int, Tensor] = {
        seed: discriminator(images(seed)).squeeze(1).detach() for seed in (1, 2)
    }

    def slope(name: str, seed: int) -> Tensor:
        u = noise()[name]
        moved: Tensor = discriminator(images(seed) + FINITE_DIFFERENCE_STEP * u).squeeze(1).detach()
        return ((moved - logits[seed]) / FINITE_DIFFERENCE_STEP).square() / 2

    flipped = discriminator(images(1).flip(3)).squeeze(1).detach()
    expected = {
        "r1_finite_difference": slope("r1", 1),
        "r2_finite_difference": slope("r2", 2),
        "consistency": (logits[1] - flipped) ** 2,
        "lecam": (logits[1] - -0.7) ** 2 + (logits[2] - 0.4) ** 2,
    }
    assert set(expected) | {"r1", "r2", "wgan_gp", "dragan"} == set(PENALTIES)
    for name, value in expected.items():
        found = PENALTIES[name].value(inputs_for(name, discriminator)).detach()
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penaltys_gradient_in_the_weights_is_that_of_finite_differences(name: str) -> None:
    discriminator = smooth_discriminator()
    PENALTIES[name].value(inputs_for(name, discriminator)).sum().backward()
    largest = 0.0
    for weight in discriminator.parameters():
        expected = differentiated(
            lambda: PENALTIES[name].value(inputs_for(name, discriminator)).sum(), weight.data
        )
        assert weight.grad is not None or not expected.any()
        found = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-6, atol=1e-8)
        largest = max(largest, float(expected.abs().max()))
    assert largest > 1e-3


def test_the_mean_of_finite_differences_is_the_squared_gradient() -> None:
    discriminator = smooth_discriminator()
    inputs = inputs_for("r1_finite_difference", discriminator)
    exact = squared_slopes(discriminator, images(1)) / 2
    torch.manual_seed(1)
    penalty = PENALTIES["r1_finite_difference"].value
    noises = [{"r1": torch.randn(SHAPE)} for _ in range(4000)]
    draws = torch.stack([penalty(replace(inputs, noise=noise)).detach() for noise in noises])
    # One draw's standard deviation is sqrt(2) times its mean; five of those of the mean's.
    torch.testing.assert_close(draws.mean(0), exact, rtol=5 * (2 / 4000) ** 0.5, atol=0)


@pytest.mark.parametrize("scale", [2.0**-8, 1.0, 2.0**20])
def test_the_inner_scale_cancels(scale: float) -> None:
    discriminator = smooth_discriminator()
    inputs = inputs_for("r1", discriminator)
    logits = discriminator(inputs.real_images).squeeze(1)
    plain = input_gradient(inputs.real_logits, inputs.real_images)
    torch.testing.assert_close(input_gradient(logits, inputs.real_images, scale), plain)


def test_gradient_normalised_logits_are_their_formula_and_bounded() -> None:
    discriminator = smooth_discriminator()
    normalised = gradient_normalised(lambda x: discriminator(x).squeeze(1), scale=8.0)
    at = images(1)
    logits = discriminator(at).squeeze(1).detach()
    expected = logits / (squared_slopes(discriminator, at).sqrt() + logits.abs())
    torch.testing.assert_close(normalised(at).detach(), expected, rtol=1e-6, atol=0)
    assert normalised(1000 * at).abs().max() <= 1


def test_gradients_of_normalised_logits_are_those_of_finite_differences() -> None:
    discriminator = smooth_discriminator()
    normalised = gradient_normalised(lambda x: discriminator(x).squeeze(1))
    at = images(1).requires_grad_()
    normalised(at).sum().backward()
    assert at.grad is not None
    torch.testing.assert_close(
        at.grad.flatten(),
        differentiated(lambda: normalised(at).sum(), at.data),
        rtol=1e-6,
        atol=1e-9,
    )
    for weight in discriminator.parameters():
        expected = differentiated(lambda: normalised(images(1)).sum(), weight.data)
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad.flatten(), expected, rtol=1e-6, atol=1e-9)


def test_the_orthogonal_penalty_sums_squared_products_of_different_filters() -> None:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(2, 3, 2), nn.Linear(5, 2)
    transposed = nn.ConvTranspose2d(2, 4, 3)
    normed: nn.Module = weight_norm(nn.Conv2d(2, 3, 1))
    net = nn.Sequential(conv, spectral_norm(linear), transposed, normed, nn.Embedding(3, 3))
    net.add_module("embedding", nn.Linear(3, 3))
    net.register_parameter("constant", nn.Parameter(torch.randn(4, 4, 4)))
    of_linear: Any = linear.parametrizations.weight  # type: ignore[union-attr]
    filters = [transposed.weight[:, output].flatten() for output in range(4)]
    expected = 0.0
    with torch.no_grad():
        weight_of_normed: Any = normed.weight
        rows_of_normed = weight_of_normed.flatten(1)
        for weight in (conv.weight.flatten(1), of_linear.original, filters, rows_of_normed):
            for i, one in enumerate(weight):
                for j, other in enumerate(weight):
                    expected += float(one @ other) ** 2 if i != j else 0.0
        assert float(orthogonal_penalty(net)) == pytest.approx(expected)
        linear = nn.Linear(3, 3)
        linear.weight.copy_(torch.eye(3) * 7)
        assert float(orthogonal_penalty(linear)) == 0


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_needs_gradients_of_exactly_the_images_its_entry_names(name: str) -> None:
    entry, discriminator = PENALTIES[name], smooth_discriminator()
    for real, fake in itertools.product((False, True), repeat=2):
        inputs = phase(discriminator, real_gradient=real, fake_gradient=fake)
        if (real or not entry.real_gradient) and (fake or not entry.fake_gradient):
            assert entry.value(inputs).shape == (SHAPE[0],)
        else:
            with pytest.raises(RuntimeError, match="does not require grad|not have been used"):
                entry.value(inputs)


@pytest.mark.parametrize("name", PENALTIES)
def test_the_configuration_knows_which_penalties_differentiate_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sections import no torch, so they cannot ask the table."""
    calls = []

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return input_gradient(*args)

    monkeypatch.setattr(penalties, "input_gradient", counted)
    PENALTIES[name].value(inputs_for(name, smooth_discriminator()))
    field = name.removesuffix("_finite_difference")
    form = "gradient" if field == name else "finite_difference"
    section = PenaltyConfig.model_validate({field: 0.1, "form": form})
    assert section.names == (name,)
    assert section.gradient_names == ((name,) if calls else ())


@pytest.mark.parametrize(("side", "seed"), [("r1", 1), ("r2", 2)])
def test_a_finite_difference_errs_by_the_square_of_its_step(
    side: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over +-sqrt(n) times each unit vector, u has the moments that r1 needs, without noise."""
    discriminator = smooth_discriminator()
    exact = squared_slopes(discriminator, images(seed)) / 2
    inputs = inputs_for(f"{side}_finite_difference", discriminator)
    n = images(seed)[0].numel()
    corners = n**0.5 * torch.cat([torch.eye(n), -torch.eye(n)])
    errors = []
    for step in (0.02, 0.01, 0.005):
        monkeypatch.setattr(penalties, "FINITE_DIFFERENCE_STEP", step)
        value = PENALTIES[f"{side}_finite_difference"].value
        noises = [{side: u.view(SHAPE[1:]).expand(SHAPE)} for u in corners]  # alike in all samples
        mean = torch.stack([value(replace(inputs, noise=noise)) for noise in noises]).mean(0)
        errors.append(float(((mean.detach() - exact) / exact).abs().max()))
    assert 1e-5 < errors[1] < 3e-3  # at the step in use
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.02)


def test_a_flat_discriminators_norms_have_finite_gradients_in_its_weights() -> None:
    level, slope = torch.tensor([3.0, -2.0, 1.0]), torch.zeros(3, requires_grad=True)

    def flat(x: Tensor) -> Tensor:
        return level + slope * x.sum(dim=(1, 2, 3))

    logits = gradient_normalised(flat)(images(1))
    torch.testing.assert_close(logits.detach(), level.sign(), rtol=0, atol=1e-5)
    inputs = replace(inputs_for("wgan_gp", smooth_discriminator()), real_logits_fn=flat)
    penalty = PENALTIES["wgan_gp"].value(inputs)
    torch.testing.assert_close(penalty.detach(), torch.ones(3), rtol=0, atol=1e-5)
    for out in (logits, penalty):
        (gradient,) = torch.autograd.grad(out.sum(), slope)
        assert torch.isfinite(gradient).all()


def test_half_precision_images_slopes_are_widened_before_they_are_unscaled() -> None:
    at = torch.ones(1, 1, 2, 2, dtype=torch.float16, requires_grad=True)
    logits = (at.float() * 1e-7).sum(dim=(1, 2, 3))  # next to a subnormal of 1.2e-7
    found = input_gradient(logits, at, 2.0**10)
    torch.testing.assert_close(
        found, torch.full((1, 1, 2, 2), 1e-7, dtype=torch.float32), rtol=1e-3, atol=0
    )


def half_precision_case(
    name: str,
    device: str,
    *,
    half: bool,
    outer_scale: float = 1.0,
    inner_scale: float = 1.0,
    head: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A penalty of R3GAN at 16x16, (n,), and its gradient in the weights, flat."""
    torch.manual_seed(0)
    discriminator = R3ganDiscriminator(
        resolution=16, img_channels=3, base_channels=32, num_classes=0, blocks_per_stage=1
    )
    for part, weight in discriminator.named_parameters():
        if part.endswith("contract.weight"):  # zero in a fresh one, which would hide the blocks
            nn.init.normal_(weight, 0.0, 0.05)

    discriminator.head.linear.weight.data.mul_(head)  # type: ignore[union-attr, operator]
    discriminator.to(device)

    def logits_fn(x: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.float16, enabled=half):
            seen: Tensor = discriminator(x)
        return seen.float()

    entry = PENALTIES[name]
    real, fake = ((torch.rand(SHAPE[0], 3, 16, 16) * 2 - 1).to(device) for _ in range(2))
    real.requires_grad_(entry.real_gradient)
    fake.requires_grad_(entry.fake_gradient)
    inputs = PenaltyInputs(
        logits_fn,
        logits_fn,
        real,
        fake,
        logits_fn(real),
        logits_fn(fake),
        {purpose: n.float().to(device) for purpose, n in noise(real.shape).items()},
        inner_scale,
    )
    value = entry.value(inputs)
    (value.mean() * outer_scale).backward()
    weights = list(discriminator.parameters())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
    return value.detach(), torch.cat([g.flatten() for g in gradients]) / outer_scale


OVERFLOWS: dict[str, set[int]] = {"r1": set(), "r2": set(), "wgan_gp": {20}, "dragan": {20}}
"""Binary logarithms of loss scales at which the weights' gradients leave fp16's range."""


@pytest.mark.parametrize("name", OVERFLOWS)
@on_each_device
def test_a_half_precision_penalty_is_fp32s_at_every_loss_scale_in_range(
    name: str, device: str
) -> None:
    torch.set_default_dtype(torch.float32)
    value, gradient = half_precision_case(name, device, half=False)
    assert gradient.norm() > 0.01
    overflowed = set()
    for power in (8, 12, 16, 20):
        found, scaled = half_precision_case(
            name, device, half=True, outer_scale=2.0**power, inner_scale=2.0**10
        )
        assert found.dtype == torch.float32
        assert not torch.equal(found, value)  # it was half precision
        torch.testing.assert_close(found, value, rtol=1e-2, atol=0)
        if not torch.isfinite(scaled).all():
            overflowed.add(power)
        else:
            assert (scaled - gradient).norm() < 2e-2 * gradient.norm()
    assert overflowed == OVERFLOWS[name]


@pytest.mark.parametrize("name", ["r1", "r2"])
@on_each_device
def test_an_inner_scale_keeps_slopes_that_half_precision_would_lose(name: str, device: str) -> None:
    """Slopes of 1e-7 a pixel are subnormal in fp16; those of 1e-4 lose nothing."""
    torch.set_default_dtype(torch.float32)
    value, _ = half_precision_case(name, device, half=False, head=1e-5)
    scaled, _ = half_precision_case(name, device, half=True, head=1e-5, inner_scale=2.0**10)
    plain, _ = half_precision_case(name, device, half=True, head=1e-5)
    torch.testing.assert_close(scaled, value, rtol=1e-2, atol=0)
    assert ((plain - value) / value).abs().max() > 5e-2
