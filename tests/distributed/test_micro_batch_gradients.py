"""Gradients and statistics of micro-batches add up to those of the whole batch in one forward."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from ganscale.world import World, process_group
from tests.support.gradients import BATCH_SIZE, StepResult, relative_difference, steps_of_cases
from tests.support.ranks import run_ranks
from tests.support.small_models import SMALL_MODELS

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "relativistic, augmented, R1 and R2": {
        "objective": {"name": "relativistic"},
        "augment": {"name": "r3gan", "p": 0.7},
        "penalty": {"r1": 0.7, "r2": 0.3},
    },
    "lazy R1": {"penalty": {"r1": 0.2, "interval": 4}},
    "Wasserstein, WGAN-GP": {"objective": {"name": "wasserstein"}, "penalty": {"wgan_gp": 5.0}},
    "hinge, dragan, consistency": {
        "objective": {"name": "hinge"},
        "penalty": {"dragan": 1.0, "consistency": 1.0},
    },
    "LeCam, ADA": {
        "penalty": {"lecam": 0.1},
        "augment": {"name": "ada", "target": 0.6, "p": 0.5},
    },
    "orthogonal": {"penalty": {"orthogonal": 0.01}},
    "gradient normalisation": {"penalty": {"gradient_normalisation": True}},
    "finite differences": {"penalty": {"r1": 0.7, "r2": 0.3, "form": "finite_difference"}},
    "semi-supervised": {"method": {"name": "semi-supervised", "labels": 20}},
    "semi-supervised, augmented, R1, orthogonal": {
        "method": {"name": "semi-supervised", "labels": 20},
        "augment": {"name": "r3gan", "p": 0.7},
        "penalty": {"r1": 0.7, "orthogonal": 0.01},
    },
    "semi-supervised, StyleGAN2": {
        "model": SMALL_MODELS["stylegan2-classes"],
        "method": {"name": "semi-supervised", "labels": 20},
    },
}
SIZES = (1, 3, 9, 64)
"""3 does not divide the ten of a batch, 9 makes two halves, 64 is more than all."""
UNEVEN = ([9, 0, 4, 2, 7, 3, 6], [8, 1, 5])
"""Two ranks' samples of the batch, in three micro-batches of at most three and in one."""
WEIGHTS = 10
"""Not 8 or 9, where rounding moves a leaky ReLU over its kink: worth 3e-5 and 1e-4 of the norm."""


def _split(micro_batch_size: int | None) -> dict[str, dict[str, Any]]:
    training = {"micro_batch_size": micro_batch_size}
    return {
        name: {"model": SMALL_MODELS["r3gan"], **sections, "training": training}
        for name, sections in CASES.items()
    }


@functools.cache
def _alone(micro_batch_size: int | None) -> dict[str, StepResult]:
    with process_group(World()):
        return steps_of_cases(World(), _split(micro_batch_size), weights=WEIGHTS)


@functools.cache
def _on_uneven_ranks() -> list[dict[str, StepResult]]:
    return run_ranks(2, steps_of_cases, _split(3), UNEVEN, WEIGHTS)


def _assert_gradients_equal(case: str, found: StepResult) -> None:
    # A finite difference has fewer digits to begin with.
    rtol = 1e-4 if "finite differences" in case else 5e-6
    whole = _alone(None)[case]
    assert found.gradients.keys() == whole.gradients.keys() == {"G", "D"}
    for letter, expected in whole.gradients.items():
        assert relative_difference(found.gradients[letter], expected) <= rtol


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_have_the_gradients_and_statistics_of_the_batch(case: str, size: int) -> None:
    found, whole = _alone(size)[case], _alone(None)[case]
    _assert_gradients_equal(case, found)
    # Fewer digits where terms of either sign have all but cancelled.
    assert found.statistics == pytest.approx(whole.statistics, rel=1e-4, abs=1e-6)
    if size >= BATCH_SIZE:
        assert found == whole  # one part is the same computation, to the bit


@pytest.mark.parametrize("case", CASES)
def test_ranks_may_have_different_numbers_of_micro_batches(case: str) -> None:
    results = [rank[case] for rank in _on_uneven_ranks()]
    for result in results:
        _assert_gradients_equal(case, result)
    assert results[0].gradients == results[1].gradients
    # Averaged over ranks, statistics are those of the global batch.
    for name, expected in _alone(None)[case].statistics.items():
        mean = sum(result.statistics[name] for result in results) / len(results)
        assert mean == pytest.approx(expected, rel=1e-4, abs=1e-6)
