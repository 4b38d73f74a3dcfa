"""The generative adversarial metric: every discriminator scores the samples of every generator.

Im et al. (2016, arXiv 1602.05110), section 4, compare two GANs by exchanging their discriminators:

    r_test    = err(D_i, test images) / err(D_j, test images)
    r_samples = err(D_i, samples of G_j) / err(D_j, samples of G_i)

i wins if r_samples < 1 while r_test is about 1, j if r_samples > 1; else it is a tie. Here
r_samples differs from 1 when its interval does.

An error rate depends on the discriminator's threshold, and a lenient discriminator is fooled by
every generator. So the ratings, which rank any number of runs, use no threshold: a discriminator
compares a sample with a test image by their logits and chooses the higher one. A run wins a game
whenever another run's discriminator chooses its generator's sample, and whenever its own
discriminator does not choose the other's sample. As in r_samples, a run is a pair of networks, so a
better discriminator counts too.

Intervals are of 95 % and resample images. They do not cover other seeds of the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganscale.metrics.elo import rate_with_intervals
from ganscale.metrics.intervals import Estimate
from ganscale.metrics.votes import Votes, VoteTable

# The paper does not say how near to 1 is near enough.
_SAME_TEST_ERROR = 1.5
_NUM_RESAMPLES = 300

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Match:
    """Two runs compared as by Im et al.; ratios are of `first` over `second`.

    Error rates are (errors + 1/2) / (images + 1), so that a ratio exists when a discriminator makes
    no error.
    """

    first: str
    second: str
    r_test: Estimate
    r_samples: Estimate
    winner: str | None
    """None for a tie."""


# The fields of `RankedRun` and `Scores` are the keys of the JSON that `ganscale tournament` writes.


@dataclass(frozen=True)
class RankedRun:
    """A run's rating and the shares behind it."""

    name: str
    rating: Estimate
    chosen: Estimate
    """How often other runs' discriminators choose its sample over a test image, averaged over
    them."""
    test_error: float
    """Share of the test images that its discriminator took for fakes."""
    own_error: float
    """Share of its own generator's samples that its discriminator took for real."""


@dataclass(frozen=True)
class Scores:
    """The ranking, the matches of all pairs, and the votes of every discriminator."""

    num_images: int
    """The number of samples of each run's generator, and of test images."""
    standings: tuple[RankedRun, ...]
    """The best run first."""
    matches: tuple[Match, ...]
    names: tuple[str, ...]
    """Labels of the tables: rows are discriminators, columns are generators."""
    chosen: tuple[tuple[float, ...], ...]
    """How often a sample is chosen over a test image; 1/2 would be a perfect generator."""
    taken_for_real: tuple[tuple[float, ...], ...]
    """Share of the samples above the discriminator's threshold."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are written to files."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The ranking, the table of choices and the matches as lines for a terminal."""
        width = max(len(name) for name in (*self.names, "run"))
        lines = [f"rank  {'run':{width}}  {'rating (95 %)':20}  chosen"]
        for rank, s in enumerate(self.standings, 1):
            rating = f"{s.rating.value:.0f} ({s.rating.low:.0f} to {s.rating.high:.0f})"
            lines.append(f"{rank:4}  {s.name:{width}}  {rating:20}  {s.chosen.value:6.3f}")
        lines += [
            "",
            "how often the discriminator of a row chooses a column's sample over a test image:",
        ]
        lines.append(" " * width + "".join(f"  {name:>{width}}" for name in self.names))
        for name, row in zip(self.names, self.chosen, strict=True):
            lines.append(f"{name:{width}}" + "".join(f"  {value:{width}.3f}" for value in row))
        return [*lines, "", *map(_describe, self.matches), "", self.conclusion()]

    def conclusion(self) -> str:
        """Who is ahead, by how much, and whether that may be chance, in one sentence."""
        first, second, *_ = self.standings
        low, high = first.rating.low, second.rating.high
        if low is not None and high is not None and low > high:
            sure = f"the lead over {second.name} is larger than chance explains"
        else:
            sure = f"the lead over {second.name} may be chance, since their intervals overlap"
        return (
            f"{first.name} is ahead: the discriminators of the others choose its samples over test "
            f"images {first.chosen.value:.0%} of the time (50% would be perfect), and {sure}."
        )


def score(logits: Floats, thresholds: Floats, names: Sequence[str], *, seed: int = 0) -> Scores:
    """Ratings and matches from logits.

    Args:
        logits: (R, R + 1, N): of each run's discriminator, on N samples of each run's generator
            and, last, on N test images. All discriminators see the same images.
        thresholds: (R,) of the discriminators: above is real. A logit at the threshold counts half.
        names: of the R runs.
        seed: of the resampling.
    """
    num_runs, num_makers, num_images = logits.shape
    if not num_runs == num_makers - 1 == len(thresholds) == len(names):
        raise ValueError(f"{len(names)} names for logits of shape {logits.shape}")
    votes = Votes(logits, thresholds)
    resampled = votes.resampled(_NUM_RESAMPLES, seed=seed)
    table = votes.table()
    # Shares times images are numbers of games, beside which the prior's one game weighs little.
    ratings = rate_with_intervals(
        num_images * _wins_of_runs(table.chosen),
        [num_images * _wins_of_runs(other.chosen) for other in resampled],
    )
    standings = [
        RankedRun(
            name=name,
            rating=ratings[i],
            chosen=_estimate(partial(_chosen_by_others, i), table, resampled),
            test_error=float(1 - table.taken[i, -1]),
            own_error=float(table.taken[i, i]),
        )
        for i, name in enumerate(names)
    ]
    return Scores(
        num_images=num_images,
        standings=tuple(sorted(standings, key=lambda s: s.rating.value, reverse=True)),
        matches=tuple(
            _match(names, i, j, table, resampled, num_images)
            for i, j in combinations(range(num_runs), 2)
        ),
        names=tuple(names),
        chosen=tuple(tuple(row) for row in table.chosen.tolist()),
        taken_for_real=tuple(tuple(row) for row in table.taken[:, :-1].tolist()),
    )


def _wins_of_runs(chosen: Floats) -> Floats:
    """Shares of games that the row's run wins against the column's, (R, R)."""
    # i wins against j when j's discriminator chooses i's sample, [j, i], and when its own does not
    # choose j's, 1 - [i, j]. The diagonal, a discriminator on the generator against which it was
    # trained, is no game.
    return (1 - np.eye(len(chosen))) * (chosen.T + 1 - chosen)


def _estimate(
    function: Callable[[VoteTable], float], table: VoteTable, resampled: Sequence[VoteTable]
) -> Estimate:
    low, high = np.quantile([function(other) for other in resampled], [0.025, 0.975])
    return Estimate(function(table), float(low), float(high))


def _chosen_by_others(i: int, table: VoteTable) -> float:
    return float(np.delete(table.chosen[:, i], i).mean())


def _match(
    names: Sequence[str],
    i: int,
    j: int,
    table: VoteTable,
    resampled: Sequence[VoteTable],
    num_images: int,
) -> Match:
    def rate(share: float) -> float:
        return float(share * num_images + 0.5) / (num_images + 1)

    def of_test(t: VoteTable) -> float:
        return rate(1 - t.taken[i, -1]) / rate(1 - t.taken[j, -1])

    def of_samples(t: VoteTable) -> float:
        return rate(t.taken[i, j]) / rate(t.taken[j, i])

    r_test = _estimate(of_test, table, resampled)
    r_samples = _estimate(of_samples, table, resampled)
    assert r_samples.low is not None
    assert r_samples.high is not None
    # The paper wants r_test "about 1": with very different discriminators r_samples compares them
    # and not the generators, so the match is a tie.
    winner = None
    if 1 / _SAME_TEST_ERROR <= r_test.value <= _SAME_TEST_ERROR:
        winner = names[i] if r_samples.high < 1 else names[j] if r_samples.low > 1 else None
    return Match(names[i], names[j], r_test, r_samples, winner)


def _describe(match: Match) -> str:
    result = f"{match.winner} wins" if match.winner else "tie"
    ratios = f"r_test {match.r_test}, r_samples {match.r_samples}"
    return f"{match.first} against {match.second}: {ratios}: {result}"
