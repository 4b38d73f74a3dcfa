"""Error rates and preferences from raters' answers.

The error rates are those of HYPE-infinity (Zhou et al. 2019, arXiv 1904.01121). An error is a fake
called real or a real image called fake; the score is the mean of both error rates, and 50 % means
that nobody can tell the images apart. Intervals are of 95 %, by bootstrap over raters, as
published; with one rater over answers, which then says nothing of other people. Preferences have
Wilson's intervals and a binomial test against 1/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from ganscale.metrics.intervals import Estimate, bootstrap, wilson_interval
from ganscale.rating.answers import Answer
from ganscale.rating.questions import REAL

Measure = Literal["error", "fakes_called_real", "reals_called_fake", "preferred"]

_NUM_RESAMPLES = 10_000
_LABELS: dict[Measure, str] = {
    "error": "wrong, fakes and real images (HYPE)",
    "fakes_called_real": "fakes called real",
    "reals_called_fake": "real images called fake",
    "preferred": "preferred",
}


@dataclass(frozen=True)
class Rate:
    """A proportion of answers with its interval."""

    measure: Measure
    contestants: tuple[str, ...]
    """The contestant of the rate, for a preference also the other one; empty for all."""
    num_answers: int
    estimate: Estimate
    p_value: float | None = None
    """Of a preference: the two-sided probability of one at least as strong by chance."""

    @property
    def label(self) -> str:
        """As it is printed: "fakes called real, runs/a"."""
        whose = " over ".join(self.contestants)
        return f"{_LABELS[self.measure]}, {whose}" if whose else _LABELS[self.measure]


def rates_of(answers: Sequence[Answer]) -> list[Rate]:
    """Every rate for which there are answers, of one folder's ratings."""
    if any(len(answer.truth) > 1 for answer in answers):
        return _preferences(answers)
    rates = _errors(answers)
    runs = sorted({a.truth[0] for a in answers} - {REAL})
    # With one run its rates are those of all answers. Errors on real images are of no run.
    if len(runs) > 1:
        reals = [a for a in answers if a.truth == (REAL,)]
        for run in runs:
            of_run = [a for a in answers if a.truth == (run,)]
            rates += [r for r in _errors(of_run + reals, (run,)) if r.contestants]
    return rates


def own_errors(answers: Sequence[Answer]) -> str:
    """One rater's number of errors, in a sentence; empty where nothing is right or wrong."""
    judged = [a for a in answers if a.correct is not None]
    wrong = sum(not a.correct for a in judged)
    return f"{wrong} of {len(judged)} answers were wrong" if judged else ""


def as_json(answers: Sequence[Answer]) -> dict[str, Any]:
    """The rates and the numbers of raters and answers as plain values."""
    rates = [
        {
            "measure": rate.measure,
            "contestants": list(rate.contestants),
            "num_answers": rate.num_answers,
            "value": rate.estimate.value,
            "low": rate.estimate.low,
            "high": rate.estimate.high,
            "p_value": rate.p_value,
        }
        for rate in rates_of(answers)
    ]
    raters = sorted({answer.rater for answer in answers})
    return {"raters": raters, "num_answers": len(answers), "rates": rates}


def as_table(answers: Sequence[Answer]) -> list[str]:
    """The rates as lines for a terminal."""
    if not answers:
        return ["no answers yet"]
    raters = len({answer.rater for answer in answers})
    rates = rates_of(answers)
    width = max(len(rate.label) for rate in rates)
    head = f"{raters} rater{'s' * (raters > 1)}, {len(answers)} answers; intervals of 95 %"
    return [f"{head} {_method(rates[0], raters)}", *(_line(rate, width) for rate in rates)]


def _errors(answers: Sequence[Answer], run: tuple[str, ...] = ()) -> list[Rate]:
    """The error on fakes, on real images, and their mean; what has no answers is left out."""
    fakes = [a for a in answers if a.truth != (REAL,)]
    reals = [a for a in answers if a.truth == (REAL,)]
    rates = []
    if fakes and reals:
        # Fakes and real images count half each, also while a rater is in the middle and has seen
        # more of one kind.
        weights = [1 / len(fakes)] * len(fakes) + [1 / len(reals)] * len(reals)
        score = _weighted_error([*fakes, *reals], weights)
        rates.append(Rate("error", run, len(answers), score))
    if fakes:
        fooled = _weighted_error(fakes, [1.0] * len(fakes))
        rates.append(Rate("fakes_called_real", run, len(fakes), fooled))
    if reals:
        doubted = _weighted_error(reals, [1.0] * len(reals))
        rates.append(Rate("reals_called_fake", (), len(reals), doubted))
    return rates


def _weighted_error(answers: Sequence[Answer], weights: Sequence[float]) -> Estimate:
    """The weighted share of wrong answers, resampled by rater, or by answer if there is one."""
    # Answers of one rater are not independent: some people are better at it. So raters are drawn,
    # with all their answers.
    several = len({answer.rater for answer in answers}) > 1
    items = [a.rater for a in answers] if several else list(range(len(answers)))
    _, groups = np.unique(items, return_inverse=True)
    weight = np.array(weights)
    wrong = weight * [not answer.correct for answer in answers]
    total_by_item, wrong_by_item = np.bincount(groups, weight), np.bincount(groups, wrong)
    return bootstrap(
        len(total_by_item),
        lambda drawn: float(wrong_by_item[drawn].sum() / total_by_item[drawn].sum()),
        num_resamples=_NUM_RESAMPLES,
    )


def _preferences(answers: Sequence[Answer]) -> list[Rate]:
    names = sorted(
        {name for a in answers for name in a.truth}, key=lambda name: (name == REAL, name)
    )
    rates = []
    for one, other in combinations(names, 2):
        chosen = [a.chosen for a in answers if set(a.truth) == {one, other}]
        if chosen:
            rates.append(_preference((one, other), chosen))
    if len(names) > 2:
        rates += [
            _preference((name,), [a.chosen for a in answers if name in a.truth]) for name in names
        ]
    return rates


def _preference(contestants: tuple[str, ...], chosen: Sequence[str]) -> Rate:
    from scipy.stats import binomtest

    wins = sum(name == contestants[0] for name in chosen)
    p_value = float(binomtest(wins, len(chosen)).pvalue)
    return Rate("preferred", contestants, len(chosen), wilson_interval(wins, len(chosen)), p_value)


def _method(rate: Rate, raters: int) -> str:
    if rate.measure == "preferred":
        return "after Wilson, p of a two-sided binomial test"
    return f"by bootstrap over {'raters' if raters > 1 else 'answers'}"


def _line(rate: Rate, width: int) -> str:
    estimate = rate.estimate
    assert estimate.low is not None
    assert estimate.high is not None
    interval = f"{estimate.low:.1%} to {estimate.high:.1%}"
    p_value = "" if rate.p_value is None else f"  p = {rate.p_value:.3g}"
    return (
        f"{rate.label:{width}}  {rate.num_answers:6}  {estimate.value:6.1%}  ({interval}){p_value}"
    )
