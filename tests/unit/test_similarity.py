"""Likeness of images against closed forms and the definitions written out as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ganscale.errors import DataError
from ganscale.metrics.extractors import EfficientNetLite0
from ganscale.metrics.similarity import feature_distance, perceptual_distance, psnr, ssim


def noise_images(num: int, side: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num, channels, side, side)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def blurred(images: Tensor) -> Tensor:
    mean = torch.nn.functional.avg_pool2d(images.float(), 3, stride=1, padding=1)
    return mean.round().to(torch.uint8)


def test_psnr_of_a_constant_difference() -> None:
    black = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    other = black.clone()
    other[0] += 5
    other[1, :, :4] += 255
    found = psnr(other, black)
    assert_close(found[0].item(), 20 * math.log10(255 / 5))
    assert_close(found[1].item(), 10 * math.log10(2))
    assert psnr(black, black).isinf().all()


def ssim_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 13 at every window of one channel, from weighted moments."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (v[top : top + 11, left : left + 11].astype(float) for v in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a = (weights * (a - mean_a) ** 2).sum()
            var_b = (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            values.append(value / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


def test_ssim_is_its_definition() -> None:
    images = noise_images(2)
    other = blurred(images)
    wanted = [
        np.mean([ssim_by_loops(a, b) for a, b in zip(x, y, strict=True)])
        for x, y in zip(images.numpy(), other.numpy(), strict=True)
    ]
    assert_close(ssim(images, other), torch.tensor(wanted, dtype=torch.float64))
    assert_close(ssim(images, images), torch.ones(2, dtype=torch.float64))


def test_ssim_needs_room_for_its_window() -> None:
    small = noise_images(1, side=8)
    with pytest.raises(DataError, match="needs 11 pixels"):
        ssim(small, small)


def test_feature_distance_is_an_angle() -> None:
    a = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    b = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert_close(feature_distance(a, b), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


def test_stages_end_in_what_the_features_come_from(network: EfficientNetLite0) -> None:
    images = noise_images(2, side=32)
    stages = network.stages(images)
    assert [stage.shape[1:] for stage in stages] == [
        (16, 48, 48),
        (24, 24, 24),
        (40, 12, 12),
        (112, 6, 6),
        (320, 3, 3),
    ]
    with torch.inference_mode():
        head = network._net._swish(network._net._bn1(network._net._conv_head(stages[-1])))
        pooled = torch.nn.functional.normalize(head.mean((2, 3)), dim=1) * math.sqrt(1280)
    assert_close(pooled, network.features(images))


def test_perceptual_distance_is_its_equation(network: EfficientNetLite0) -> None:
    images, other = noise_images(2, side=32), noise_images(2, side=32, seed=1)
    wanted = np.zeros(2)
    for a, b in zip(network.stages(images), network.stages(other), strict=True):
        for row in range(2):
            x, y = a[row].double().numpy(), b[row].double().numpy()
            x, y = x / np.linalg.norm(x, axis=0), y / np.linalg.norm(y, axis=0)
            wanted[row] += ((x - y) ** 2).sum(0).mean()
    found = perceptual_distance(images, other, network)
    assert_close(found, torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)


def test_perceptual_distance_grows_with_damage(network: EfficientNetLite0) -> None:
    images = noise_images(3, side=32)
    once = blurred(images)
    twice = blurred(blurred(once))
    gray = noise_images(2, side=32, channels=1)
    assert_close(perceptual_distance(images, images, network), torch.zeros(3).double())
    near, far = (perceptual_distance(other, images, network) for other in (once, twice))
    assert (near > 0).all()
    assert (near < far).all()
    assert perceptual_distance(gray, blurred(gray), network).shape == (2,)
