"""Objectives against their closed forms in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch

from ganscale.config import ObjectiveConfig
from ganscale.objectives.adversarial import OBJECTIVES

REAL = torch.tensor([-30.0, -3.0, -0.5, 0.0, 0.5, 3.0, 30.0])
FAKE = torch.tensor([2.0, -1.5, -0.5, 1.0, -25.0, 4.0, 28.0])


def minus_log_sigmoid(t: float) -> float:
    return -math.log(1 / (1 + math.exp(-t)))


def cross_entropy(real: float, fake: float) -> float:
    return minus_log_sigmoid(real) + minus_log_sigmoid(-fake)


Formula = Callable[[float, float], float]

CLOSED_FORMS: dict[str, tuple[Formula, Formula]] = {
    "nonsaturating": (cross_entropy, lambda real, fake: minus_log_sigmoid(fake)),
    "minimax": (cross_entropy, lambda real, fake: math.log(1 / (1 + math.exp(fake)))),
    "least_squares": (
        lambda real, fake: 0.5 * (real - 1) ** 2 + 0.5 * fake**2,
        lambda real, fake: 0.5 * (fake - 1) ** 2,
    ),
    "hinge": (
        lambda real, fake: max(0.0, 1 - real) + max(0.0, 1 + fake),
        lambda real, fake: -fake,
    ),
    "wasserstein": (lambda real, fake: fake - real, lambda real, fake: -fake),
    "relativistic_average": (
        cross_entropy,
        lambda real, fake: minus_log_sigmoid(fake) + minus_log_sigmoid(-real),
    ),
    "relativistic": (
        lambda real, fake: minus_log_sigmoid(real - fake),
        lambda real, fake: minus_log_sigmoid(fake - real),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_its_closed_form(name: str) -> None:
    objective = OBJECTIVES[name]
    for loss, formula in zip(
        (objective.discriminator, objective.generator), CLOSED_FORMS[name], strict=True
    ):
        pairs = zip(REAL.tolist(), FAKE.tolist(), strict=True)
        expected = torch.tensor([formula(real, fake) for real, fake in pairs])
        torch.testing.assert_close(loss(REAL, FAKE), expected)


def test_every_objective_can_be_configured() -> None:
    assert set(get_args(ObjectiveConfig.model_fields["name"].annotation)) == set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_a_generator_that_sees_real_logits_needs_them(name: str) -> None:
    objective = OBJECTIVES[name]
    if objective.generator_sees_real:
        changed = objective.generator(REAL + 1, FAKE)
        assert not torch.equal(objective.generator(REAL, FAKE), changed)
    else:
        assert torch.equal(objective.generator(None, FAKE), objective.generator(REAL, FAKE))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_half_precision_logits_stay_finite(name: str) -> None:
    real = torch.tensor([-60000.0, 60000.0, -60000.0], dtype=torch.float16)
    fake = torch.tensor([-60000.0, 60000.0, 60000.0], dtype=torch.float16)
    objective = OBJECTIVES[name]
    assert torch.isfinite(objective.discriminator(real, fake)).all()
    assert torch.isfinite(objective.generator(real, fake)).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_bounded_objectives_loss_stays_as_it_is_where_logits_lie_far_apart(name: str) -> None:
    real, fake, objective = torch.tensor([1000.0]), torch.tensor([-1000.0]), OBJECTIVES[name]
    losses = [objective.discriminator(real * factor, fake * factor) for factor in (1, 2)]
    assert torch.equal(*losses) is objective.bounded


def test_only_minimax_saturates_for_a_confident_discriminator() -> None:
    for name, expected in (("nonsaturating", -1.0), ("minimax", 0.0)):
        logits = torch.tensor([-20.0], requires_grad=True)
        OBJECTIVES[name].generator(None, logits).sum().backward()
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, torch.tensor([expected]), atol=1e-6, rtol=0)
