"""Precision, recall, density, coverage and copies: by hand, by brute force, by torch-fidelity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from ganscale.errors import DataError
from ganscale.metrics.prdc import authenticity, nearest, prdc


def draws(num: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(num, 16, generator=torch.Generator().manual_seed(seed)) + shift


def brute(x: Tensor, y: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """All distances in float64, pair by pair."""
    difference = x.double().numpy()[:, None] - y.double().numpy()[None]
    found: np.ndarray[tuple[int, int], np.dtype[np.float64]] = np.sqrt(np.square(difference).sum(2))
    return found


def radius(x: Tensor, k: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    found: np.ndarray[tuple[int], np.dtype[np.float64]] = np.sort(brute(x, x), axis=1)[:, k]
    return found


@pytest.mark.parametrize(("num", "other", "shift"), [(300, 300, 0.2), (257, 400, 0.5)])
def test_all_four_are_those_of_the_definitions(num: int, other: int, shift: float) -> None:
    fake, real = draws(num, 1, shift), draws(other, 2)
    distances = brute(fake, real)
    found = prdc(fake, real)
    three, five = radius(real, 3), radius(real, 5)
    precision = (distances <= three).any(1).mean()
    recall = (distances <= radius(fake, 3)[:, None]).any(0).mean()
    density = (distances <= five).sum() / (5 * num)
    coverage = (distances <= five).any(0).mean()
    values = [found.precision, found.recall, found.density, found.coverage]
    assert [v.value for v in values] == pytest.approx([precision, recall, density, coverage])
    for estimate in values:
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high


def test_precision_and_recall_are_those_of_torch_fidelity() -> None:
    fake, real = draws(1500, 1, 0.4), draws(1500, 2)
    theirs = prc_features_to_metric(fake, real, verbose=False)
    found = prdc(fake, real)
    assert found.precision.value == pytest.approx(theirs["precision"], rel=1e-3)
    assert found.recall.value == pytest.approx(theirs["recall"], rel=1e-3)


def test_far_from_the_origin_nothing_changes() -> None:
    fake, real = draws(400, 1, 0.3), draws(400, 2)
    near, far = prdc(fake, real), prdc(fake + 300, real + 300)
    assert near.density.value == pytest.approx(far.density.value, rel=0.01)
    assert near.recall.value == pytest.approx(far.recall.value, abs=0.01)


def test_dropped_modes_cost_recall_and_noise_costs_precision() -> None:
    modes = 12 * torch.eye(16)[:8]
    real = draws(800, 1) + modes.repeat(100, 1)
    dropped = draws(800, 2) + modes[:2].repeat(400, 1)
    noisy = draws(800, 3) * 6 + modes.repeat(100, 1)
    same = prdc(draws(800, 4) + modes.repeat(100, 1), real)
    few, loud = prdc(dropped, real), prdc(noisy, real)
    assert few.recall.value < 0.4 < 0.7 < same.recall.value
    assert few.precision.value > 0.7
    assert few.coverage.value < 0.4
    assert loud.precision.value < 0.2 < 0.7 < same.precision.value


def test_copies_are_not_authentic() -> None:
    real = draws(300, 1)
    copies = real[:100] + 1e-3 * draws(100, 5)
    fresh = draws(300, 2, 0.3)
    assert authenticity(copies, real).value == 0.0
    mixed = authenticity(torch.cat([copies, fresh]), real).value
    assert mixed == pytest.approx(0.75 * authenticity(fresh, real).value)
    own = radius(real, 1)
    distances = brute(fresh, real)
    expected = (distances.min(1) > own[distances.argmin(1)]).mean()
    assert authenticity(fresh, real).value == pytest.approx(expected)


def test_the_nearest_reference_is_found() -> None:
    fake, real = draws(50, 1), draws(1300, 2)
    distances, places = nearest(fake, real)
    expected = brute(fake, real)
    assert places.tolist() == expected.argmin(1).tolist()
    torch.testing.assert_close(distances.double().numpy(), expected.min(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num", "other"), [(5, 300), (300, 5), (3, 300)])
def test_too_few_images_are_an_error(num: int, other: int) -> None:
    with pytest.raises(DataError, match=r"\d images are too few for \d neighbours"):
        prdc(draws(min(num, 3) if num < 6 else num, 1), draws(other, 2))
