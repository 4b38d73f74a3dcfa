"""Shared layers and conditioning against linear algebra and loops by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.models.layers import (
    FullPrecision,
    MinibatchStd,
    binomial_filter,
    downsample,
    spectral_norm,
    upsample,
)


def settled(module: nn.Module, num_forwards: int = 500) -> Tensor:
    """The normed weight after many steps of the power iteration."""
    weight = module.weight
    for _ in range(num_forwards):
        weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


@pytest.mark.parametrize(
    "layer", [nn.Linear(7, 5), nn.Conv2d(3, 8, 3), nn.Embedding(6, 4), nn.Linear(9, 1)]
)
def test_a_spectrally_normed_weight_has_a_largest_singular_value_of_1(layer: nn.Module) -> None:
    torch.manual_seed(0)
    normed = spectral_norm(copy.deepcopy(layer))
    largest = torch.linalg.svdvals(settled(normed).flatten(1))[0]
    torch.testing.assert_close(largest, torch.tensor(1.0), rtol=1e-4, atol=0)


def test_a_forward_in_training_is_one_step_of_the_power_iteration_and_in_evaluation_none() -> None:
    torch.manual_seed(0)
    layer: Any = spectral_norm(nn.Linear(4, 3))
    norm, matrix = layer.parametrizations.weight[0], layer.parametrizations.weight.original.detach()
    right = F.normalize(matrix.T @ norm.left, dim=0)
    left = F.normalize(matrix @ right, dim=0)
    torch.testing.assert_close(layer.weight, matrix / (left @ matrix @ right))
    torch.testing.assert_close(norm.left, left)
    layer.eval()
    assert torch.equal(layer.weight, layer.weight)
    assert torch.equal(norm.left, left)


def test_the_gradient_through_the_norm_is_equation_12() -> None:
    torch.manual_seed(0)
    layer: Any = spectral_norm(nn.Linear(4, 3))
    weight, upstream = settled(layer), torch.randn(3, 4)
    (weight * upstream).sum().backward()
    raw = layer.parametrizations.weight.original
    left, values, right = torch.linalg.svd(raw.detach())
    direction = torch.outer(left[:, 0], right[0])
    inner = (upstream * weight.detach()).sum()
    torch.testing.assert_close(raw.grad, (upstream - inner * direction) / values[0])


def test_two_forwards_before_a_backward_and_half_precision_do_no_harm() -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        (layer(x).sum() + layer(2 * x).sum()).backward()
        assert layer.weight.dtype == torch.float32
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


def test_upsampling_is_four_times_the_adjoint_of_downsampling() -> None:
    taps = binomial_filter().double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((downsample(x, taps) * y).sum(), (x * upsample(y, taps)).sum() / 4)
    assert torch.autograd.gradgradcheck(lambda t: upsample(t, taps).tanh(), y.requires_grad_())


def test_upsampling_a_row_by_hand() -> None:
    """Of 1, 2, 4 with zeros beyond: a quarter of one neighbour, three of the other."""
    expected = [3 / 4, (3 + 2) / 4, (1 + 6) / 4, (6 + 4) / 4, (2 + 12) / 4, 12 / 4]
    rows = torch.tensor([1.0, 2.0, 4.0]).expand(1, 1, 3, 3)
    # Rows are alike, so away from the upper and lower border only columns matter.
    found = upsample(rows, binomial_filter())[0, 0, 2]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_minibatch_std_is_the_mean_deviation_of_the_batch() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, 3)
    total = 0.0
    for place in x.flatten(1).T.tolist():
        mean = sum(place) / 5
        total += (sum((value - mean) ** 2 for value in place) / 5) ** 0.5
    out = MinibatchStd()(x)
    assert torch.equal(out[:, :2], x)
    torch.testing.assert_close(out[:, 2], torch.full((5, 3, 3), total / 18))


def test_full_precision_layers_compute_as_without_autocast() -> None:
    layers = FullPrecision(nn.Linear(4, 3), nn.Tanh())
    x = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found, half = layers(x), nn.Sequential(*layers)(x)
    assert (found.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(found, layers[1](layers[0](x)))


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 3, 3), nn.Embedding(6, 4), nn.Linear(4, 3)])
def test_each_forward_before_a_backward_is_normed_by_its_own_vectors(layer: nn.Module) -> None:
    torch.manual_seed(0)
    normed: Any = spectral_norm(copy.deepcopy(layer)).double()
    norm, raw = normed.parametrizations.weight[0], normed.parametrizations.weight.original
    matrix, left = raw.detach().flatten(1), norm.left.clone()
    loss, expected = torch.zeros(()).double(), torch.zeros_like(matrix)
    for _ in range(2):
        upstream = torch.randn_like(raw)
        loss = loss + (normed.weight * upstream).sum()
        right = matrix.T @ left / (matrix.T @ left).norm()
        left = matrix @ right / (matrix @ right).norm()
        sigma, c = left @ matrix @ right, upstream.flatten(1)
        expected += (c - (c * matrix).sum() / sigma * torch.outer(left, right)) / sigma
        torch.testing.assert_close((norm.left, norm.right), (left, right))
    loss.backward()
    torch.testing.assert_close(raw.grad.flatten(1), expected)


def test_spectral_norm_computes_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    plain: Any = spectral_norm(nn.Conv2d(3, 8, 3))
    mixed = copy.deepcopy(plain)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixed.weight
    assert torch.equal(found, plain.weight)
    assert mixed.parametrizations.weight[0].left.dtype == torch.float32


def test_evaluation_moves_no_vector_and_a_state_carries_them() -> None:
    torch.manual_seed(0)
    layer, other = spectral_norm(nn.Linear(4, 3)), spectral_norm(nn.Linear(4, 3))
    settled(layer, 3)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    assert len(before) == 4  # bias, weight and two vectors
    settled(layer, 3)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    other.eval()
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(before)
    assert torch.equal(other.weight, layer.weight)
    twin = copy.deepcopy(layer)
    settled(twin.train())
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def filtered(image: list[list[float]], taps: list[float]) -> list[list[float]]:
    """Every second pixel of the map filtered along both sides, zeros beyond, by loops."""
    size, out = len(image), []
    for top in range(-1, size - 1, 2):
        row = []
        for start in range(-1, size - 1, 2):
            total = 0.0
            for i, vertical in enumerate(taps):
                for j, horizontal in enumerate(taps):
                    y, x = top + i, start + j
                    if 0 <= y < size and 0 <= x < size:
                        total += vertical * horizontal * image[y][x]
            row.append(total)
        out.append(row)
    return out


def test_downsampling_is_a_loop_over_pixels_and_taps() -> None:
    taps = [0.4, 0.1, 0.3, 0.2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    found = downsample(x, torch.tensor(taps, dtype=torch.float64))
    expected = [[filtered(channel, taps) for channel in image] for image in x.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_resampling_keeps_constants_away_from_the_border() -> None:
    taps, level = binomial_filter(), torch.full((1, 2, 8, 8), 3.0)
    for out in (downsample(level, taps), upsample(level, taps)):
        torch.testing.assert_close(out[..., 1:-1, 1:-1], torch.full_like(out, 3.0)[..., 1:-1, 1:-1])
        assert out[0, 0, -1, -1] < 3.0 or out[0, 0, 0, 0] < 3.0  # zeros lie beyond
    assert upsample(level, taps).shape == (1, 2, 16, 16)
    assert downsample(level, taps).shape == (1, 2, 4, 4)


def test_downsampling_is_twice_differentiable() -> None:
    taps = binomial_filter().double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: downsample(t, taps).tanh(), x)


def test_full_precision_keeps_doubles_and_widens_halves() -> None:
    identity = FullPrecision(nn.Identity())
    for given, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert identity(torch.ones(2, dtype=given)).dtype == expected


def test_minibatch_std_of_half_precision_is_computed_in_fp32() -> None:
    x = torch.tensor([300.0, -300.0], dtype=torch.float16).view(2, 1, 1, 1)  # squares overflow
    out = MinibatchStd()(x)
    assert out.dtype == torch.float16
    assert out[:, 1].flatten().tolist() == [300.0, 300.0]
