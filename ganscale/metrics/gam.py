"""The generative adversarial metric: who wins when every discriminator judges every generator.

Im et al. (2016, arXiv 1602.05110), section 4, compare two GANs by letting each judge the other:

    r_test    = err(D_i, test images) / err(D_j, test images)
    r_samples = err(D_i, samples of G_j) / err(D_j, samples of G_i)

i wins if r_samples < 1 while r_test is about 1, j if r_samples > 1; else it is a tie, such as when
one discriminator is simply better than the other. Here r_test is about 1 within a factor of 1.5,
and r_samples differs from 1 when its interval does.

What is wrong depends on a judge's threshold, and a lenient judge is fooled by all. So the ratings
that rank any number of runs take none: a judge is shown a sample and a test image and says by its
logits which looks more real. A run scores whenever its generator's sample is chosen by another's
judge, and whenever its own judge does not choose the other's. As in r_samples, a run is a pair: a
better discriminator counts, too. What the generator alone does is in a second rating, for which
generators and judges are players of their own (as in Olsson et al. 2018, arXiv 1808.04888): there
a generator is not to blame for sharp judges, but where few runs meet it depends much on the worst
judge's taste. No judge is asked about its own generator, against whose samples it was trained.

Intervals have 95 % and resample images: they know nothing of other seeds of the runs.
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
from ganscale.metrics.votes import Table, Votes

__all__ = ["Match", "Scores", "Standing", "score"]

_SAME_TEST_ERROR = 1.5
_NUM_RESAMPLES = 300

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Match:
    """Two runs by Im et al.; ratios are of `first` over `second`.

    Error rates in them are (errors + 1/2) / (images + 1), so that a faultless judge divides.
    """

    first: str
    second: str
    r_test: Estimate
    r_samples: Estimate
    winner: str | None
    """None for a tie."""


@dataclass(frozen=True)
class Standing:
    """One run: its rating, those of its generator and its judge alone, and what they did."""

    name: str
    rating: Estimate
    generator_rating: Estimate
    judge_rating: Estimate
    chosen: Estimate
    """How often other runs' judges choose its sample over a test image, mean over the judges."""
    test_error: float
    """Share of the test images that its judge took for fakes."""
    own_error: float
    """Share of its own generator's samples that its judge took for real."""


@dataclass(frozen=True)
class Scores:
    """The ranking, best run first; the matches; and what every judge said."""

    num_images: int
    """Of each run's generator, and of the test set."""
    standings: tuple[Standing, ...]
    matches: tuple[Match, ...]
    names: tuple[str, ...]
    """Of the rows and columns of the tables, whose rows are judges and columns generators."""
    chosen: tuple[tuple[float, ...], ...]
    """How often a sample is chosen over a test image; 1/2 would be a perfect generator."""
    taken_for_real: tuple[tuple[float, ...], ...]
    """Share of the samples above the judge's threshold."""

    def to_json(self) -> dict[str, Any]:
        """As it is written in files."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: the ranking, what judges chose, the matches."""
        width = max(len(name) for name in (*self.names, "run"))
        columns = f"{'rating (95 %)':20}  generator  judge  chosen"
        lines = [f"rank  {'run':{width}}  {columns}"]
        for rank, s in enumerate(self.standings, 1):
            parts = f"{s.generator_rating.value:9.0f}  {s.judge_rating.value:5.0f}"
            rating = f"{s.rating.value:.0f} ({s.rating.low:.0f} to {s.rating.high:.0f})"
            lines.append(f"{rank:4}  {s.name:{width}}  {rating:20}  {parts}  {s.chosen.value:6.3f}")
        lines += ["", "how often the judge of a row chooses a column's sample over a test image:"]
        lines.append(" " * width + "".join(f"  {name:>{width}}" for name in self.names))
        for name, row in zip(self.names, self.chosen, strict=True):
            lines.append(f"{name:{width}}" + "".join(f"  {value:{width}.3f}" for value in row))
        return [*lines, "", *map(_describe, self.matches)]


def score(logits: Floats, thresholds: Floats, names: Sequence[str], *, seed: int = 0) -> Scores:
    """Ratings and matches from logits.

    Args:
        logits: (R, R + 1, N): of each run's judge, on N samples of each run's generator and, last,
            on N test images. All judges see the same images.
        thresholds: (R,) of the judges: above is real. A logit at the threshold counts half.
        names: of the R runs.
        seed: of the resampling.
    """
    num_runs, num_makers, num_images = logits.shape
    if not num_runs == num_makers - 1 == len(thresholds) == len(names):
        raise ValueError(f"{len(names)} names for logits of shape {logits.shape}")
    votes = Votes(logits, thresholds)
    resampled = votes.resampled(_NUM_RESAMPLES, seed=seed)
    table = votes.table()
    ratings, parts = (
        rate_with_intervals(
            num_images * wins(table.chosen), [num_images * wins(t.chosen) for t in resampled]
        )
        for wins in (_wins_of_runs, _wins_of_players)
    )
    standings = [
        Standing(
            name=name,
            rating=ratings[i],
            generator_rating=parts[num_runs + i],
            judge_rating=parts[i],
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
    """Of the row's run over the column's, (R, R): a sample chosen, or the other's not chosen."""
    return (1 - np.eye(len(chosen))) * (chosen.T + 1 - chosen)


def _wins_of_players(chosen: Floats) -> Floats:
    """The same of judges and then generators as players of their own, (2R, 2R)."""
    others, none = 1 - np.eye(len(chosen)), np.zeros(chosen.shape)
    return np.block([[none, others * (1 - chosen)], [(others * chosen).T, none]])


def _estimate(
    function: Callable[[Table], float], table: Table, resampled: Sequence[Table]
) -> Estimate:
    low, high = np.quantile([function(other) for other in resampled], [0.025, 0.975])
    return Estimate(function(table), float(low), float(high))


def _chosen_by_others(i: int, table: Table) -> float:
    return float(np.delete(table.chosen[:, i], i).mean())


def _match(
    names: Sequence[str],
    i: int,
    j: int,
    table: Table,
    resampled: Sequence[Table],
    num_images: int,
) -> Match:
    def rate(share: float) -> float:
        return float(share * num_images + 0.5) / (num_images + 1)

    def of_test(t: Table) -> float:
        return rate(1 - t.taken[i, -1]) / rate(1 - t.taken[j, -1])

    def of_samples(t: Table) -> float:
        return rate(t.taken[i, j]) / rate(t.taken[j, i])

    r_test = _estimate(of_test, table, resampled)
    r_samples = _estimate(of_samples, table, resampled)
    assert r_samples.low is not None
    assert r_samples.high is not None
    winner = None
    if 1 / _SAME_TEST_ERROR <= r_test.value <= _SAME_TEST_ERROR:
        winner = names[i] if r_samples.high < 1 else names[j] if r_samples.low > 1 else None
    return Match(names[i], names[j], r_test, r_samples, winner)


def _describe(match: Match) -> str:
    result = f"{match.winner} wins" if match.winner else "tie"
    ratios = f"r_test {match.r_test}, r_samples {match.r_samples}"
    return f"{match.first} against {match.second}: {ratios}: {result}"
