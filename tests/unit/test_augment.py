"""Each augmentation transform at forced draws, against what it says worked out another way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from ganscale.augment.draws import Draws
from ganscale.augment.geometry import SYM6, resample
from ganscale.augment.pipeline import Augmentation

Rows = list[list[float]]
Function = Callable[[Tensor, Tensor], Tensor]

YES, NO = 0.0, 0.999
"""First uniform numbers of a transform that is, and is not, executed at p = 1/2."""


def image(resolution: int = 16, n: int = 1, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, resolution, resolution, generator=generator) * 2 - 1


def forced(
    images: Tensor, transforms: str, uniform: Rows, normal: Rows | None = None, p: float = 0.5
) -> Tensor:
    """Augment with these numbers, a row per sample; transforms are in the order of the columns."""
    augmentation = Augmentation(dict.fromkeys(transforms.split(), 1.0))
    draws = Draws(torch.tensor(uniform), torch.tensor(normal or [[]] * len(uniform)))
    blank = augmentation.draw(len(uniform), torch.Generator())
    assert draws.uniform.shape == blank.uniform.shape
    assert draws.normal.shape == blank.normal.shape
    return augmentation(images, draws, p)


def test_xflip_is_a_flip_for_half_of_the_samples_that_execute_it() -> None:
    images = image(n=3)
    result = forced(images, "xflip", [[YES, 0.49], [YES, 0.51], [NO, 0.49]])
    assert torch.equal(result[0], images[0].flip(2))
    assert torch.equal(result[1:], images[1:])


@pytest.mark.parametrize("resolution", [15, 16])
@pytest.mark.parametrize("quarters", range(4))
def test_rotate90_is_rot90(resolution: int, quarters: int) -> None:
    images = image(resolution, n=2)
    turn = (quarters + 0.5) / 4
    result = forced(images, "rotate90", [[YES, turn], [NO, turn]])
    assert torch.equal(result[0], torch.rot90(images[0], quarters, (1, 2)))
    assert torch.equal(result[1], images[1])


def shifted(images: Tensor, down: int, right: int, mode: str) -> Tensor:
    size, pad = images.shape[-1], 4
    padded = functional.pad(images, (pad,) * 4, mode=mode)
    return padded[..., pad - down : pad - down + size, pad - right : pad - right + size]


@pytest.mark.parametrize(("down", "right"), [(-4, 3), (0, 1), (2, -4), (4, 4)])
def test_xint_is_a_roll_with_its_borders_reflected(down: int, right: int) -> None:
    images = image(32)
    numbers = [(shift * 0.999 / 4 + 1) / 2 for shift in (down, right)]  # 4 is an eighth of 32
    result = forced(images, "xint", [[YES, *numbers]])
    rolled = images.roll((down, right), (2, 3))
    edge = slice(4, 28)
    assert torch.equal(result[..., edge, edge], rolled[..., edge, edge])
    assert torch.equal(result, shifted(images, down, right, "reflect"))


def test_xint_is_uniform_before_it_is_rounded() -> None:
    u = [0.0, 0.06, 0.065, 0.43, 0.45, 0.55, 0.57, 0.93, 0.94, 0.999]
    ramp = torch.arange(32.0).expand(1, 1, 32, 32).repeat(len(u), 1, 1, 1)
    result = forced(ramp, "xint", [[YES, 0.5, value] for value in u])
    assert (ramp - result)[:, 0, 16, 16].tolist() == [-4, -4, -3, -1, 0, 0, 1, 3, 4, 4]


def test_whole_moves_are_composed_as_flip_turn_shift() -> None:
    images = image(32)
    result = forced(images, "xflip rotate90 xint", [[YES, 0.1, YES, 0.3, YES, 0.8, 0.999]])
    expected = shifted(torch.rot90(images.flip(3), 1, (2, 3)), 2, 4, "reflect")
    assert torch.equal(result, expected)


PLACE = torch.arange(12, dtype=torch.float64)


def test_sym6_is_the_orthonormal_lowpass_with_six_vanishing_moments() -> None:
    taps = torch.tensor(SYM6, dtype=torch.float64)
    assert len(taps) == 12
    assert_close(taps.sum().item(), math.sqrt(2), rtol=0, atol=1e-15)
    for shift in range(6):
        product = (taps[2 * shift :] * taps[: 12 - 2 * shift]).sum().item()
        assert_close(product, float(shift == 0), rtol=0, atol=1e-15)
    for moment in range(6):
        highpass_moment = ((-1) ** PLACE * PLACE**moment * taps).sum().item()
        assert abs(highpass_moment) < 1e-15 * 12**moment, moment


def spectral_factors() -> list[Tensor]:
    """Return all lowpasses with these properties (Daubechies 1992, section 6.1).

    |H|^2 = cos(w / 2)^12 P(sin(w / 2)^2), P(y) = sum_k C(5 + k, k) y^k; every root y is a pair z,
    1 / z with z + 1 / z = 2 - 4 y, of which a filter takes one, conjugates alike.
    """
    coefficients = [math.comb(5 + k, k) / math.comb(10, 5) for k in range(5)]
    companion = torch.diag(torch.ones(4, dtype=torch.float64), -1)
    companion[:, -1] = -torch.tensor(coefficients, dtype=torch.float64)
    middle = 1 - 2 * torch.linalg.eigvals(companion)
    pairs = [(m, m + (m * m - 1).sqrt()) for m in middle if m.imag > -1e-9]
    factors = []
    for inverted in itertools.product((False, True), repeat=len(pairs)):
        taps = torch.ones(1, dtype=torch.complex128)
        roots = [-torch.ones((), dtype=torch.complex128)] * 6
        for (m, z), invert in zip(pairs, inverted, strict=True):
            root = 1 / z if invert else z
            roots += [root, root.conj()] if m.imag > 1e-9 else [root]
        for root in roots:
            taps = functional.pad(taps, (1, 0)) - root * functional.pad(taps, (0, 1))
        factors.append(taps.real * math.sqrt(2) / taps.real.sum())
    return factors


def bend(taps: Tensor) -> float:
    """Return how far the phase is from a straight line, over the band the filter passes."""
    frequency = torch.linspace(0.01, math.pi / 2, 200, dtype=torch.float64)
    waves = torch.polar(torch.ones(200, 12, dtype=torch.float64), torch.outer(frequency, PLACE))
    phase = (waves.mT * taps[:, None]).sum(0).log().imag
    phase = phase + 2 * math.pi * functional.pad((phase.diff() < -3).cumsum(0), (1, 0))
    slope = (phase * frequency).sum() / (frequency * frequency).sum()
    return float((phase - slope * frequency).abs().max())


def test_sym6_is_the_spectral_factor_of_the_straightest_phase() -> None:
    factors = sorted(spectral_factors(), key=bend)
    assert len(factors) == 8  # each and its reverse
    taps = torch.tensor(SYM6, dtype=torch.float64)
    distances = [(taps - factor).abs().max().item() for factor in factors]
    assert min(distances[:2]) < 1e-12
    assert bend(factors[2]) > 1.3 * bend(taps)


def test_resampling_in_place_changes_nothing_up_to_the_borders() -> None:
    images = image(16, n=2).double()
    nearly = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1e-9]]] * 2, dtype=torch.float64)
    result = resample(images, nearly)
    assert not torch.equal(result, images)
    assert_close(result, images, rtol=0, atol=1e-7)


def test_only_samples_that_move_continuously_are_filtered() -> None:
    images = image(16, n=4)
    names = "scale rotate aniso xfrac"
    off = [NO, NO, 0.6, NO, 0.6, NO, NO]
    uniform = [off, [YES, *off[1:]], off, [*off[:-1], YES]]
    result = forced(images, names, uniform, [[0.5, 0.5, 0.5, 0.5]] * 4)
    assert torch.equal(result[[0, 2]], images[[0, 2]])
    assert (result[[1, 3]] - images[[1, 3]]).abs().flatten(1).amax(1).min() > 0.1


def blob(y: Tensor, x: Tensor) -> Tensor:
    """Return a lopsided smooth bump off the centre, near zero 14 pixels from it."""
    return torch.exp(-((y + 3) ** 2 / 18 + (x - 2) ** 2 / 10 + (y + 3) * (x - 2) / 30))


def drawn(function: Function, resolution: int = 32) -> Tensor:
    place = torch.arange(resolution, dtype=torch.float64) - (resolution - 1) / 2
    return function(place[:, None], place[None, :])[None, None]


def moved(function: Function, forward: Tensor) -> Tensor:
    """Draw the function's picture after a forward motion (3, 3) of points (right, up, 1)."""
    inverse = torch.linalg.inv(forward)

    def seen(y: Tensor, x: Tensor) -> Tensor:
        points = torch.stack(torch.broadcast_tensors(x, -y, torch.ones_like(y)))
        right, up, _ = torch.einsum("ij,jhw->ihw", inverse, points)
        return function(-up, right)

    return drawn(seen)


def turning(angle: float) -> Tensor:
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=torch.float64)


def growing(right: float, up: float) -> Tensor:
    return torch.diag(torch.tensor([right, up, 1.0], dtype=torch.float64))


def shifting(right: float, up: float) -> Tensor:
    return torch.tensor([[1, 0, right], [0, 1, up], [0, 0, 1]], dtype=torch.float64)


CONTINUOUS: dict[str, tuple[str, list[float], list[float], Tensor]] = {
    "magnify": ("scale", [YES], [1.5], growing(2**0.3, 2**0.3)),
    "shrink": ("scale", [YES], [-1.5], growing(2**-0.3, 2**-0.3)),
    "turn before": ("rotate", [YES, 0.6, NO, 0.9], [], turning(0.2 * math.pi)),
    "turn after": ("rotate", [NO, 0.6, YES, 0.3], [], turning(-0.4 * math.pi)),
    "half a turn": ("rotate", [YES, 0.0, NO, 0.0], [], turning(math.pi)),
    "stretch": ("aniso", [YES], [1.5], growing(2**0.3, 2**-0.3)),
    "shift": ("xfrac", [YES], [0.3, -0.55], shifting(-0.55 * 4, -0.3 * 4)),
    "all": (
        "scale rotate aniso xfrac",
        [YES, YES, 0.6, YES, 0.3, YES, YES],
        [0.5, -1.0, 0.3, -0.55],
        shifting(-2.2, -1.2)
        @ turning(-0.4 * math.pi)
        @ growing(2**-0.2, 2**0.2)
        @ turning(0.2 * math.pi)
        @ growing(2**0.1, 2**0.1),
    ),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_moves_draw_the_moved_function(name: str) -> None:
    transforms, uniform, normal, forward = CONTINUOUS[name]
    result = forced(drawn(blob), transforms, [uniform], [normal])
    # Interpolating half pixels errs by (f_yy + f_xx) / 32 at most, here (1 / 9 + 1 / 5) / 32, and
    # the filter's phase is not quite linear; a tenth of a pixel amiss would show as 0.03.
    inside = slice(4, 28)
    expected = moved(blob, forward)
    assert_close(result[..., inside, inside], expected[..., inside, inside], rtol=0, atol=0.012)
    assert (result - drawn(blob)).abs().max() > 0.1


@pytest.mark.parametrize("quarters", [-1, 1, 2])
def test_a_right_angle_through_the_continuous_path_is_rot90(quarters: int) -> None:
    images = 10 * image(56).double()
    for _ in range(3):
        images = functional.avg_pool2d(images, 9, stride=1)  # leaves 32 x 32
    angle = 0.5 + quarters / 4 - 1e-6
    result = forced(images, "rotate", [[YES, angle, NO, 0.0]])
    assert_close(result, torch.rot90(images, quarters, (2, 3)), rtol=0, atol=0.02)
    assert images.std() > 0.2


def test_a_fractional_shift_moves_a_wave_by_that_much() -> None:
    def wave(y: Tensor, x: Tensor) -> Tensor:
        return torch.sin(2 * math.pi * (x / 8 + y / 11))

    result = forced(drawn(wave), "xfrac", [[YES]], [[0.2, 0.35]])
    expected = drawn(lambda y, x: wave(y - 0.2 * 4, x - 0.35 * 4))
    inside = slice(8, 24)
    # A wave of 8 pixels loses at most (pi / 8) ** 2 / 8 of its height to interpolation, per axis.
    assert_close(result[..., inside, inside], expected[..., inside, inside], rtol=0, atol=0.03)


@pytest.mark.parametrize("periods", [-2, -0.5, 0.5, 1, 1.5])
def test_far_beyond_the_border_lies_the_reflected_image(periods: float) -> None:
    images = drawn(blob, 17)
    result = forced(images, "xfrac", [[YES]], [[0.0, periods * 32 / (17 / 8)]])
    expected = images if periods % 1 == 0 else images.flip(3)
    assert_close(result, expected, rtol=0, atol=0.01)


def colour_matrix(forward: Tensor, offset: float = 0.0) -> Tensor:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3], matrix[:3, 3] = forward, offset
    return matrix


AXIS = torch.full((3,), 1 / math.sqrt(3), dtype=torch.float64)
ALONG = torch.outer(AXIS, AXIS)
EYE = torch.eye(3, dtype=torch.float64)
CROSS = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)

COLOURS: dict[str, tuple[list[float], list[float], Tensor]] = {
    "brightness": ([YES], [1.5], colour_matrix(EYE, 0.3)),
    "contrast": ([YES], [-1.5], colour_matrix(EYE * 2**-0.75)),
    "lumaflip": ([YES, 0.4], [], colour_matrix(EYE - 2 * ALONG)),
    "hue": ([YES, 0.6], [], colour_matrix(torch.linalg.matrix_exp(0.2 * math.pi * CROSS))),
    "saturation": ([YES], [1.5], colour_matrix(ALONG + (EYE - ALONG) * 2**1.5)),
}


def with_matrix(images: Tensor, matrix: Tensor) -> Tensor:
    one = torch.ones_like(images[:, :1])
    return torch.einsum("ij,njhw->nihw", matrix, torch.cat((images, one), 1))[:, :3]


@pytest.mark.parametrize("name", [*COLOURS, "all"])
def test_colours_are_the_papers_matrices(name: str) -> None:
    images = image().double()
    uniform: list[float] = []
    normal: list[float] = []
    expected = images
    for part in COLOURS if name == "all" else [name]:
        uniform, normal = uniform + COLOURS[part][0], normal + COLOURS[part][1]
        expected = with_matrix(expected, COLOURS[part][2])
    names = " ".join(COLOURS) if name == "all" else name
    result = forced(images, names, [uniform], [normal])
    assert_close(result, expected, rtol=0, atol=1e-6)
    assert (result - images).abs().max() > 0.1

    opaque = torch.rand_like(images[:, :1])
    rgba = forced(torch.cat((images, opaque), 1), names, [uniform], [normal])
    assert_close(rgba[:, :3], result)
    assert torch.equal(rgba[:, 3:], opaque)

    gray = images[:, :1]
    result = forced(gray, names, [uniform], [normal])
    assert_close(result, with_matrix(gray.repeat(1, 3, 1, 1), expected_matrix(name))[:, :1])
    if name in ("hue", "saturation"):
        assert torch.equal(result, gray)


def expected_matrix(name: str) -> Tensor:
    matrices = [COLOURS[part][2] for part in (COLOURS if name == "all" else [name])]
    return torch.linalg.multi_dot(matrices[::-1]) if len(matrices) > 1 else matrices[0]


def test_a_third_of_a_turn_of_hue_makes_red_green() -> None:
    images = image()
    result = forced(images, "hue", [[YES, 0.5 + 1 / 3]])
    assert_close(result, images[:, [2, 0, 1]], rtol=0, atol=1e-5)


def test_no_saturation_leaves_luma_and_a_luma_flip_negates_it() -> None:
    images = image()
    luma = (images[:, :1] + images[:, 1:2] + images[:, 2:]) / 3
    result = forced(images, "saturation", [[YES]], [[-1000.0]])
    assert_close(result, luma.expand_as(images))
    result = forced(images, "lumaflip", [[YES, 0.4]])
    assert_close(result.mean(1, keepdim=True), -luma)
    assert_close(result[:, 0] - result[:, 1], images[:, 0] - images[:, 1])
    assert torch.equal(forced(images, "lumaflip", [[YES, 0.6]]), images)


def test_cutout_is_a_gray_square_of_half_the_side_wherever_its_centre_is() -> None:
    images = image(16, n=4, channels=4) + 5
    centres = [[0.5, 0.25], [0.0, 0.999], [0.72, 0.5], [0.5, 0.5]]
    gates = [YES, YES, YES, NO]
    rows = [[gate, *centre] for gate, centre in zip(gates, centres, strict=True)]
    gray = (forced(images, "cutout", rows) == 0).all(1)
    expected = torch.zeros(4, 16, 16, dtype=torch.bool)
    expected[0, 4:12, 0:8] = True
    expected[1, 0:4, 12:16] = True
    expected[2, 8:16, 4:12] = True  # 0.72 of 16 is nearest to the border below pixel 11
    assert torch.equal(gray, expected)
    kept = forced(images, "cutout", rows).masked_select(~expected.unsqueeze(1))
    assert torch.equal(kept, images.masked_select(~expected.unsqueeze(1)))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_diffaugment_colour_is_its_equations(channels: int) -> None:
    images = image(8, n=3, channels=channels).double()
    numbers = [[YES, 0.9, 0.2, 0.7], [YES, 0.1, 0.75, 0.4], [NO, 0.1, 0.2, 0.3]]
    result = forced(images, "colour", numbers)
    for sample, (_, brightness, saturation, contrast) in enumerate(numbers[:2]):
        x = images[sample, :3] + (brightness - 0.5)
        per_pixel = sum(x) / len(x)
        x = (x - per_pixel) * (saturation * 2) + per_pixel
        x = (x - x.mean()) * (contrast + 0.5) + x.mean()
        assert_close(result[sample, :3], x, rtol=0, atol=1e-6)
    assert torch.equal(result[2], images[2])
    assert torch.equal(result[:, 3:], images[:, 3:])


def test_diffaugment_translation_shifts_by_an_eighth_at_most_into_zeros() -> None:
    shifts = list(range(-4, 5))
    images = image(32, n=10) + 5
    numbers = [[YES, (s + 4.01) / 9, (4.99 - s) / 9] for s in shifts]
    result = forced(images, "translation", [*numbers, [NO, 0.1, 0.1]])
    for sample, shift in enumerate(shifts):
        expected = shifted(images[sample], shift, -shift if shift else 0, "constant")
        assert torch.equal(result[sample], expected)
    assert torch.equal(result[9], images[9])
