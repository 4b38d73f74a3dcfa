"""Distances between sets of features: closed forms, torch-fidelity, and what is refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from ganscale.errors import DataError
from ganscale.metrics.fid import (
    frechet_distance,
    frechet_estimate,
    frechet_infinity,
)
from ganscale.metrics.inception_score import inception_score
from ganscale.metrics.intervals import jackknife, wilson_interval
from ganscale.metrics.kid import kernel_distance
from ganscale.metrics.statistics import Moments, check_features

D = 24


def draws(num: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Correlated features of a few magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(99)) / D**0.5
    found: Tensor = scale * torch.randn(num, D, generator=generator) @ mix + shift
    return found


def exact_moments(mean: Tensor, covariance: Tensor) -> Moments:
    count = 10**6
    return Moments(count, mean.double(), covariance.double() * (count - 1))


@pytest.mark.parametrize("sizes", [[700], [1, 699], [3, 0, 300, 397], [5000, 9000]])
def test_moments_of_parts_are_those_of_the_whole(sizes: list[int]) -> None:
    whole = draws(sum(sizes), 0, shift=1000.0)
    moments = Moments.none(D)
    for part in whole.split(sizes):
        moments = moments.merged(Moments.of(part))
    assert moments.count == len(whole)
    expected = np.cov(whole.double().numpy(), rowvar=False)
    torch.testing.assert_close(moments.mean, whole.double().mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.covariance.numpy(), expected, rtol=1e-8, atol=1e-10)


def test_the_distance_of_gaussians_that_commute_is_the_closed_form() -> None:
    a, b = torch.rand(D).double() + 0.1, torch.rand(D).double() + 0.1
    turn, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))
    mean = torch.randn(D).double()
    x = exact_moments(mean, turn @ a.diag() @ turn.T)
    y = exact_moments(torch.zeros(D), turn @ b.diag() @ turn.T)
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-11)


def test_the_distance_of_any_gaussians_is_that_by_the_matrix_root() -> None:
    x, y = Moments.of(draws(300, 1)), Moments.of(draws(400, 2, shift=0.3, scale=1.4))
    product = (x.covariance @ y.covariance).numpy()
    root = np.trace(scipy.linalg.sqrtm(product).real)
    traces = (x.covariance + y.covariance).trace()
    expected = float((x.mean - y.mean).square().sum() + traces) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_frechet_kernel_and_inception_score_are_those_of_torch_fidelity() -> None:
    x, y = draws(2500, 1), draws(2500, 2, shift=0.1, scale=1.1)
    stats = [fid_features_to_statistics(features) for features in (x, y)]
    fid = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert frechet_estimate(x, Moments.of(y)).value == pytest.approx(fid, rel=1e-6)
    kid = kid_features_to_metric(x, y, verbose=False)
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-5)
    assert found.high is not None
    half = 1.96 * kid["kernel_inception_distance_std"] / math.sqrt(99)
    assert found.high - found.value == pytest.approx(half, rel=1e-3)
    isc = isc_features_to_metric(4 * x)["inception_score_mean"]
    assert inception_score(4 * x).value == pytest.approx(isc, rel=1e-9)


def test_the_kernel_distance_is_the_unbiased_estimate_by_its_definition() -> None:
    x, y = draws(30, 1).double(), draws(30, 2).double()

    def k(a: Tensor, b: Tensor) -> float:
        return float((a.dot(b) / D + 1) ** 3)

    pairs = [(i, j) for i in range(30) for j in range(30)]
    within = sum(k(s[i], s[j]) for s in (x, y) for i, j in pairs if i != j) / (30 * 29)
    between = sum(k(x[i], y[j]) for i, j in pairs) / 900
    found = kernel_distance(x, y, num_subsets=3, subset_size=30)
    assert found.value == pytest.approx(within - 2 * between, rel=1e-10)


def test_the_inception_score_has_its_extremes() -> None:
    certain = 100 * torch.eye(7).repeat(1000, 1)
    # Of a random split, the classes are nearly balanced.
    assert inception_score(certain).value == pytest.approx(7, rel=0.02)
    assert inception_score(torch.ones(1000, 7)).value == pytest.approx(1, rel=1e-12)


def test_extrapolation_takes_the_bias_of_few_samples_away() -> None:
    reference = exact_moments(torch.zeros(D), torch.eye(D))
    few, infinity = [], []
    for seed in range(40):
        x = torch.randn(200, D, generator=torch.Generator().manual_seed(seed))
        few.append(frechet_estimate(x, reference).value)
        infinity.append(frechet_infinity(x, reference).value)
    assert min(few) > 0.5  # of a distance that is 0
    assert abs(np.mean(infinity)) < 0.1 * np.mean(few)


def test_the_interval_covers_what_other_samples_give() -> None:
    reference = exact_moments(torch.zeros(D), torch.eye(D))
    found = []
    for seed in range(200):
        x = torch.randn(400, D, generator=torch.Generator().manual_seed(seed))
        found.append(frechet_estimate(x, reference))
    middle = np.mean([estimate.value for estimate in found])
    covered = [e.low <= middle <= e.high for e in found if e.low is not None and e.high is not None]
    assert 0.85 < np.mean(covered) <= 1.0
    assert len(covered) == 200


def test_each_group_is_left_out_in_turn() -> None:
    x, reference = draws(203, 0), Moments.of(draws(500, 1))
    order = np.random.default_rng(3).permutation(203)
    left_out = []
    for group in np.array_split(order, 10):
        rest = np.setdiff1d(np.arange(203), group)
        left_out.append(frechet_distance(Moments.of(x[torch.from_numpy(rest)]), reference))
    expected = jackknife(frechet_distance(Moments.of(x), reference), left_out)
    estimate = frechet_estimate(x, reference, seed=3)
    assert estimate.value == pytest.approx(expected.value, rel=1e-9)
    assert estimate.low == pytest.approx(expected.low, rel=1e-9)
    assert estimate.high == pytest.approx(expected.high, rel=1e-9)


def test_what_has_no_distance_is_an_error() -> None:
    good, few = Moments.of(draws(100, 0)), Moments.of(draws(D, 0))
    same = Moments.of(torch.ones(100, D))
    with pytest.raises(DataError, match="the reference: 24 images are too few for 24 features"):
        frechet_distance(good, few)
    for pair in ((same, good), (good, same)):
        with pytest.raises(DataError, match="all 100 images have the same features"):
            frechet_distance(*pair)
    with pytest.raises(DataError, match="the samples: 1 images are too few for a covariance"):
        frechet_distance(Moments.of(draws(1, 0)), good)


def test_fewer_samples_than_features_have_a_distance() -> None:
    samples, reference = Moments.of(draws(D // 2, 0)), Moments.of(draws(100, 1))
    product = (samples.covariance @ reference.covariance).numpy()
    roots = np.sqrt(np.linalg.eigvals(product).real.clip(min=0)).sum()
    traces = float(samples.covariance.trace() + reference.covariance.trace())
    step = (samples.mean - reference.mean).square().sum()
    expected = float(step) + traces - 2 * roots
    assert frechet_distance(samples, reference) == pytest.approx(expected, rel=1e-6)


def test_too_few_images_are_an_error_everywhere() -> None:
    with pytest.raises(DataError, match="999 images are too few for a kernel distance"):
        kernel_distance(draws(999, 0), draws(2000, 1))
    with pytest.raises(DataError, match="9 images are too few for an inception score"):
        inception_score(draws(9, 0))
    with pytest.raises(DataError, match="too few"):
        frechet_infinity(draws(2 * D, 0), Moments.of(draws(100, 0)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_an_error(bad: float) -> None:
    features = draws(100, 0)
    features[[17, 30], 3] = bad
    with pytest.raises(
        DataError, match="a set: 2 images, first number 17, have non-finite features"
    ):
        check_features(features, "a set")
    with pytest.raises(DataError, match="no features"):
        check_features(torch.empty(0, D), "a set")


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value: Any = frechet_infinity(draws(200, 0), Moments.of(draws(200, 1)))
    assert math.isfinite(value.value)


@pytest.mark.parametrize("num_trials", [3, 10, 64, 199, 2000])
def test_a_share_of_none_or_all_ends_at_exactly_0_or_1(num_trials: int) -> None:
    """The other bound is z^2 / (n + z^2) away (Wilson 1927)."""
    none, every = wilson_interval(0, num_trials), wilson_interval(num_trials, num_trials)
    away = 1.959963984540054**2 / (num_trials + 1.959963984540054**2)
    assert (none.low, every.high) == (0.0, 1.0)
    assert none.high == pytest.approx(away)
    assert every.low == pytest.approx(1 - away)
