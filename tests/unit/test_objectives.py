"""Objectives against their closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch

from ganscale.objectives.adversarial import OBJECTIVES

LOGITS = torch.tensor([-30.0, -3.0, -0.5, 0.0, 0.5, 3.0, 30.0], dtype=torch.float32)


def _sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_discriminator_is_binary_cross_entropy(name: str) -> None:
    objective = OBJECTIVES[name]
    real = torch.tensor([-math.log(_sigmoid(t)) for t in LOGITS.tolist()])
    fake = torch.tensor([-math.log(_sigmoid(-t)) for t in LOGITS.tolist()])
    torch.testing.assert_close(objective.discriminator_real(LOGITS), real)
    torch.testing.assert_close(objective.discriminator_fake(LOGITS), fake)


def test_generators_match_their_equations() -> None:
    nonsaturating = torch.tensor([-math.log(_sigmoid(t)) for t in LOGITS.tolist()])
    minimax = torch.tensor([math.log(_sigmoid(-t)) for t in LOGITS.tolist()])
    torch.testing.assert_close(OBJECTIVES["nonsaturating"].generator(LOGITS), nonsaturating)
    torch.testing.assert_close(OBJECTIVES["minimax"].generator(LOGITS), minimax)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_half_precision_logits_stay_finite(name: str) -> None:
    objective = OBJECTIVES[name]
    logits = torch.tensor([-60000.0, 60000.0], dtype=torch.float16)
    for loss in (objective.discriminator_real, objective.discriminator_fake, objective.generator):
        assert torch.isfinite(loss(logits)).all()


def test_only_minimax_saturates_for_a_confident_discriminator() -> None:
    for name, expected in (("nonsaturating", -1.0), ("minimax", 0.0)):
        logits = torch.tensor([-20.0], requires_grad=True)
        OBJECTIVES[name].generator(logits).sum().backward()
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, torch.tensor([expected]), atol=1e-6, rtol=0)
