"""Ratings of players from a table of wins: Bradley and Terry's model on Elo's scale.

A player of strength s beats one of strength t with probability 1 / (1 + exp(t - s)) (Bradley and
Terry 1952, Biometrika 39, p. 324). The strengths are those under which the whole table is most
probable (Hunter 2004, Annals of Statistics 32, p. 384), so the order of the games does not matter,
as it does for ratings that are updated game by game. Ratings are 400 / log(10) times the strengths
with mean 1500: 400 points more mean winning 10 of 11 games.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ganscale.metrics.intervals import Estimate

POINTS = 400 / math.log(10)
"""Rating points of a unit of strength."""

_MEAN = 1500.0
# Newton converges quadratically, so a few steps reach this; the bound on their number is for
# tables whose rounding never does.
_PRECISION = 1e-9
_MAX_STEPS = 200

Floats = NDArray[np.float64]


def rate(wins: Floats, *, prior_games: float = 1.0) -> Floats:
    """Most probable ratings, (P,), given the games of P players.

    Args:
        wins: (P, P), how many games the row's player won against the column's; parts of games
            count. Pairs need not have met equally often, or at all.
        prior_games: how many games each player has in addition against a player of strength 0, half
            of them won. They give a finite rating to a player that never lost, and to groups that
            never met, and hardly count beside hundreds of real games. Above 0.

    Raises `ValueError` for a table that is not square, or has negative or non-finite numbers.
    """
    wins = np.asarray(wins, dtype=np.float64)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or not wins.size:
        raise ValueError(f"expected a square table of wins, got shape {wins.shape}")
    if not np.isfinite(wins).all() or (wins < 0).any() or prior_games <= 0:
        raise ValueError("expected finite wins of at least 0 and prior_games above 0")
    games = wins + wins.T
    strengths = np.zeros(len(wins))
    for _ in range(_MAX_STEPS):
        step = np.linalg.solve(*_hessian_and_gradient(strengths, wins, games, prior_games))
        # Far from the optimum Newton's step can overshoot. The loss is convex, so some fraction of
        # the step decreases it; at the optimum the step shrinks to nothing and the loop ends.
        before = _loss(strengths, wins, prior_games)
        while _loss(strengths - step, wins, prior_games) > before:
            step = step / 2
        strengths = strengths - step
        if np.abs(step).max() < _PRECISION:
            break
    # Only the prior's player, of strength 0, fixes where the scale begins. That place means nothing
    # to a reader, so the mean of the ratings is set instead.
    ratings: Floats = _MEAN + POINTS * (strengths - strengths.mean())
    return ratings


def _loss(s: Floats, wins: Floats, prior_games: float) -> float:
    """Minus the logarithm of the table's probability; convex in the strengths."""
    beaten = np.logaddexp(0, s[None, :] - s[:, None])  # -log p(row beats column)
    prior = (np.logaddexp(0, s) + np.logaddexp(0, -s)).sum() / 2
    return float((wins * beaten).sum() + prior_games * prior)


def _hessian_and_gradient(
    s: Floats, wins: Floats, games: Floats, prior_games: float
) -> tuple[Floats, Floats]:
    """The Hessian of the loss, (P, P), and its gradient, (P,)."""
    p, p_prior = _sigmoid(s[:, None] - s[None, :]), _sigmoid(s)
    curvature = games * p * (1 - p)
    # Without the prior's term the matrix is a graph Laplacian, which is singular: it has a zero
    # eigenvalue for every group of players that never met another group.
    own = curvature.sum(axis=1) + prior_games * p_prior * (1 - p_prior)
    gradient = (games * p - wins).sum(axis=1) + prior_games * (p_prior - 0.5)
    return np.diag(own) - curvature, gradient


def rate_with_intervals(
    wins: Floats, resampled: Sequence[Floats], *, prior_games: float = 1.0
) -> list[Estimate]:
    """A rating for each player with the percentile interval over resampled tables of wins.

    Args:
        wins: (P, P), as for `rate`.
        resampled: the same table for resamples with replacement of what was drawn by chance in the
            first place, such as the images that were compared.
        prior_games: as for `rate`.
    """
    ratings = rate(wins, prior_games=prior_games)
    drawn = np.stack([rate(table, prior_games=prior_games) for table in resampled])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [Estimate(*map(float, values)) for values in zip(ratings, low, high, strict=True)]


def _sigmoid(x: Floats) -> Floats:
    # Unlike 1 / (1 + exp(-x)), this does not overflow for players that are far apart.
    return 0.5 * (1 + np.tanh(x / 2))
