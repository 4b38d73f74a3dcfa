"""Ratings against closed forms, another algorithm, and games of known strengths."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import brentq

from ganscale.metrics.elo import POINTS, rate, rate_with_intervals

Floats = NDArray[np.float64]


def test_two_players_differ_by_the_odds_of_their_games() -> None:
    ratings = rate(np.array([[0.0, 7500.0], [2500.0, 0.0]]), prior_games=1e-6)
    assert ratings[0] - ratings[1] == pytest.approx(400 * math.log10(3), abs=1e-4)
    assert ratings.mean() == pytest.approx(1500)


@pytest.mark.parametrize(("difference", "odds"), [(0, 1.0), (400, 10.0), (-400, 0.1)])
def test_400_points_are_odds_of_ten(difference: float, odds: float) -> None:
    ratings = rate(np.array([[0.0, 1000 * odds], [1000.0, 0.0]]), prior_games=1e-6)
    assert ratings[0] - ratings[1] == pytest.approx(difference, abs=1e-3)


def test_a_rating_gives_back_the_share_of_wins() -> None:
    ratings = rate(np.array([[0.0, 810.0], [190.0, 0.0]]), prior_games=1e-6)
    share = 1 / (1 + 10 ** ((ratings[1] - ratings[0]) / 400))
    assert share == pytest.approx(0.81, abs=1e-6)


def test_who_never_lost_is_held_by_the_prior() -> None:
    """By symmetry the strengths are d and -d, and 10 (1 - p(2d)) = p(d) - 1/2 at the best d."""

    def p(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    d = brentq(lambda d: 10 * (1 - p(2 * d)) - (p(d) - 0.5), 0, 10, xtol=1e-12)
    ratings = rate(np.array([[0.0, 10.0], [0.0, 0.0]]), prior_games=1.0)
    assert ratings == pytest.approx([1500 + POINTS * d, 1500 - POINTS * d], abs=1e-4)


def minorised(wins: Floats, prior_games: float) -> Floats:
    """Hunter's algorithm, equation 3, with the prior as games against a player of weight 1."""
    gamma = np.ones(len(wins))
    games = wins + wins.T
    for _ in range(3000):
        shared = (games / (gamma[:, None] + gamma[None, :])).sum(axis=1)
        gamma = (wins.sum(axis=1) + prior_games / 2) / (shared + prior_games / (gamma + 1))
    strengths = np.log(gamma)
    ratings: Floats = 1500 + POINTS * (strengths - strengths.mean())
    return ratings


def test_ratings_are_those_of_hunters_algorithm() -> None:
    wins = np.random.default_rng(0).uniform(0, 5, (6, 6))
    np.fill_diagonal(wins, 0)
    assert rate(wins, prior_games=0.7) == pytest.approx(minorised(wins, 0.7), abs=1e-4)


def test_groups_that_never_met_are_rated_within_themselves() -> None:
    wins = np.zeros((4, 4))
    wins[0, 1], wins[1, 0] = 300, 100
    wins[2, 3], wins[3, 2] = 300, 100
    ratings = rate(wins)
    assert ratings[:2] == pytest.approx(ratings[2:], abs=1e-6)
    assert ratings[0] - ratings[1] == pytest.approx(400 * math.log10(3), abs=2)


def simulated(strengths: Floats, num_games: int, random: np.random.Generator) -> Floats:
    p = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    upper = np.triu(random.binomial(num_games, p).astype(np.float64), 1)
    wins: Floats = upper + np.tril(num_games - upper.T, -1)
    return wins


def test_the_strengths_of_simulated_players_are_found() -> None:
    strengths = np.array([-1.0, -0.2, 0.1, 0.4, 0.7])
    wins = simulated(strengths, 20000, np.random.default_rng(1))
    assert rate(wins) == pytest.approx(1500 + POINTS * strengths, abs=6)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """100 tournaments of three players: 95 % intervals must miss some of the 300, not many."""
    random = np.random.default_rng(2)
    strengths = np.array([-0.5, 0.0, 0.5])
    truth = 1500 + POINTS * strengths
    covered = 0
    for _ in range(100):
        wins = simulated(strengths, 200, random)
        shares = wins / 200
        resampled = [
            np.triu(drawn, 1) + np.tril(200 - np.triu(drawn, 1).T, -1)
            for drawn in (random.binomial(200, shares).astype(np.float64) for _ in range(40))
        ]
        estimates = rate_with_intervals(wins, resampled)
        for estimate, value in zip(estimates, truth, strict=True):
            assert estimate.low is not None
            assert estimate.high is not None
            covered += estimate.low <= value <= estimate.high
    assert 0.85 < covered / 300 < 0.985  # 40 resamples make 95 % intervals a little short


@pytest.mark.parametrize(
    "wins", [np.ones((2, 3)), np.array([[0.0, -1.0], [1.0, 0.0]]), np.array([[0.0, np.nan]] * 2)]
)
def test_a_table_that_is_none_is_refused(wins: Floats) -> None:
    with pytest.raises(ValueError, match="expected"):
        rate(wins)
