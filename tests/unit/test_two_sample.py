"""Accuracy tests, the nearest-neighbour classifier and its null, and what repeats say together."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import binom, norm

from ganscale.metrics.intervals import Estimate, wilson_interval
from ganscale.metrics.two_sample import (
    Repeat,
    TwoSampleReport,
    accuracy_test,
    nearest_neighbour_accuracy,
)


def gaussians(
    number: int, dims: int, *, shift: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of standard normal features whose means are `shift` apart."""
    draws = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, number, dims, generator=draws)
    return real, fake + shift / math.sqrt(dims)


def by_brute_force(real: torch.Tensor, fake: torch.Tensor) -> float:
    """The accuracy, one difference at a time in float64; without ties."""
    pool = torch.cat([real, fake]).double().numpy()
    labels = np.repeat([0, 1], len(real))
    right = []
    for number, point in enumerate(pool):
        distances = np.square(pool - point).sum(1)
        distances[number] = math.inf
        right.append(labels[distances.argmin()] == labels[number])
    return float(np.mean(right))


@pytest.mark.parametrize(
    ("correct", "trials"), [(50, 100), (61, 100), (0, 7), (7, 7), (1040, 2000)]
)
def test_an_accuracys_p_value_sums_the_binomials_upper_tail(correct: int, trials: int) -> None:
    test = accuracy_test(correct, trials)
    tail = math.fsum(math.comb(trials, k) / 2**trials for k in range(correct, trials + 1))
    assert test.p_value == pytest.approx(tail, rel=1e-9)
    assert test.accuracy == wilson_interval(correct, trials)


def test_an_accuracy_needs_trials() -> None:
    with pytest.raises(ValueError, match="0 successes in 0 trials"):
        accuracy_test(0, 0)


def test_guesses_of_half_real_half_fake_images_are_less_spread_than_the_binomial() -> None:
    # A classifier that says "real" with probability q of any image.
    half, said_real = 50, np.arange(51)
    for q in (0.5, 0.7, 0.95):
        hits = np.convolve(binom.pmf(said_real, half, q), binom.pmf(said_real, half, 1 - q))
        for correct in (56, 60, 65):
            assert hits[correct:].sum() <= accuracy_test(correct, 2 * half).p_value + 1e-12


@pytest.mark.parametrize("dims", [1, 3, 40])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_neighbours_are_those_of_brute_force(dims: int, offset: float) -> None:
    real, fake = gaussians(150, dims, shift=1.0, seed=dims)
    real, fake = real.double() + offset, fake.double() + offset
    assert nearest_neighbour_accuracy(real, fake).value == by_brute_force(real, fake)


def test_many_points_are_judged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = gaussians(60, 2, shift=1.0)
    whole = nearest_neighbour_accuracy(real, fake)
    monkeypatch.setattr("ganscale.metrics.two_sample._CHUNK_DISTANCES", 700)
    assert nearest_neighbour_accuracy(real, fake) == whole


def test_the_interval_has_the_variance_of_all_ways_to_deal_out_the_labels() -> None:
    # Ten points on a line: the neighbours stay, 5 of 10 are called real in each of 252 ways.
    places = torch.tensor([0.0, 1.0, 2.5, 3.1, 5.0, 8.0, 8.3, 9.9, 12.0, 12.4])
    pool = places[:, None]
    nearest = ((pool - pool.T).abs() + torch.eye(10) * 99).argmin(1)
    hits = []
    for real in itertools.combinations(range(10), 5):
        is_real = torch.zeros(10, dtype=torch.bool)
        is_real[list(real)] = True
        hits.append(int((is_real == is_real[nearest]).sum()))
    assert np.mean(hits) == pytest.approx(10 * 4 / 9)
    # So many independent trials have the variance of the share of hits, at most those there are.
    num_trials = min(10, round(10**2 / 4 / float(np.var(hits))))
    assert num_trials < 10
    for chosen in ([0, 1, 2, 3, 4], [0, 2, 4, 6, 8], [0, 1, 5, 6, 9]):
        rest = [number for number in range(10) if number not in chosen]
        found = nearest_neighbour_accuracy(pool[chosen], pool[rest])
        expected = wilson_interval(round(num_trials * found.value), num_trials)
        assert (found.low, found.high) == (expected.low, expected.high)


def test_intervals_keep_their_promise_where_nothing_differs() -> None:
    found = [nearest_neighbour_accuracy(*gaussians(100, 5, seed=seed)) for seed in range(400)]
    assert np.mean([covers(one, 0.5) for one in found]) >= 0.92


def covers(estimate: Estimate, value: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= value <= estimate.high


@pytest.mark.parametrize("shift", [1.0, 2.0, 4.0])
def test_with_many_points_the_accuracy_is_what_cover_and_hart_derive(shift: float) -> None:
    # Cover and Hart 1967: 1 - 2 E[eta (1 - eta)], where eta is the chance that a point is real.
    def wrong(x: float) -> float:
        real, fake = norm.pdf(x), norm.pdf(x, shift)
        return float(real * fake / (real + fake))

    expected = 1 - quad(wrong, -10, 10 + shift)[0]
    pairs = [gaussians(1500, 1, shift=shift, seed=seed) for seed in range(4)]
    found = np.mean([nearest_neighbour_accuracy(*pair).value for pair in pairs])
    assert found == pytest.approx(expected, abs=0.02)


def test_sets_far_apart_are_told_apart() -> None:
    assert nearest_neighbour_accuracy(*gaussians(50, 2, shift=100.0)).value == 1.0


def test_copies_favour_neither_side() -> None:
    # Each point four times, dealt out by chance: order among equals must not matter.
    found = []
    for seed in range(200):
        draws = torch.Generator().manual_seed(seed)
        points = torch.randn(50, 3, generator=draws).repeat(4, 1)
        points = points[torch.randperm(200, generator=draws)]
        found.append(nearest_neighbour_accuracy(points[:100], points[100:], seed=seed))
    values = [one.value for one in found]
    tolerance = 4 * float(np.std(values)) / math.sqrt(200)
    assert np.mean(values) == pytest.approx(99 / 199, abs=tolerance)
    assert np.mean([covers(one, 99 / 199) for one in found]) >= 0.9


def test_all_images_alike_are_not_told_apart() -> None:
    found = nearest_neighbour_accuracy(torch.full((300, 8), 0.1), torch.full((300, 8), 0.1))
    assert covers(found, 299 / 599)


def test_the_seed_decides_among_copies() -> None:
    points = torch.zeros(100, 2)
    one, again, other = (nearest_neighbour_accuracy(points, points, seed=s) for s in (0, 0, 1))
    assert one == again
    assert one != other


@pytest.mark.parametrize(
    ("real", "fake"),
    [((5, 2), (4, 2)), ((5, 2), (5, 3)), ((1, 2), (1, 2)), ((5, 2, 2), (5, 2, 2))],
)
def test_features_need_one_shape(real: tuple[int, ...], fake: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected two sets of features"):
        nearest_neighbour_accuracy(torch.zeros(real), torch.zeros(fake))


def test_features_must_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        nearest_neighbour_accuracy(torch.zeros(5, 2), torch.full((5, 2), math.nan))


def repeat(seed: int, correct: int, p_value: float) -> Repeat:
    accuracy = wilson_interval(correct, 100)
    return Repeat(seed, accuracy, p_value, accuracy, accuracy)


def test_repeats_are_summed_up_without_taking_them_for_independent() -> None:
    report = TwoSampleReport.of(50, [repeat(0, 50, 0.5), repeat(1, 56, 0.02), repeat(2, 53, 0.1)])
    assert report.accuracy.value == pytest.approx(0.53)
    alone = wilson_interval(53, 100)
    assert report.accuracy.low == pytest.approx(alone.low, abs=1e-3)
    assert report.accuracy.high == pytest.approx(alone.high, abs=1e-3)
    assert report.p_value == pytest.approx(0.2)
    assert TwoSampleReport.of(50, [repeat(0, 40, 0.9)] * 2).p_value == 1.0


def test_a_single_repeat_is_itself() -> None:
    report = TwoSampleReport.of(50, [repeat(3, 56, 0.13)])
    assert report.p_value == 0.13
    assert report.accuracy == wilson_interval(56, 100)
    assert report.to_json()["repeats"][0]["accuracy"]["value"] == 0.56
