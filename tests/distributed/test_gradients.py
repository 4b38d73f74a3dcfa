"""Both players' gradients are those of one process on the whole batch, whatever the loss."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from ganscale.config import Config
from ganscale.generation.latents import StepRandomness
from ganscale.training.build import build_state
from ganscale.training.methods.gan import Gan
from ganscale.training.players import Player
from ganscale.training.precision import Precision
from ganscale.training.share import Moment, Share
from ganscale.world import World
from tests.support.ranks import run_ranks
from tests.support.small_models import SMALL_MODELS

BATCH_SIZE = 10
PENALTIES: dict[str, dict[str, Any]] = {
    "no penalty": {},
    "R1": {"r1": 0.7},
    "R1 and R2": {"r1": 0.7, "r2": 0.3},
    "WGAN-GP": {"wgan_gp": 5.0},
}
OTHERS: dict[str, dict[str, Any]] = {
    "relativistic average": {"objective": {"name": "relativistic_average"}},
    "relativistic, augmented, R1 and R2": {
        "objective": {"name": "relativistic"},
        "augment": {"name": "r3gan", "p": 0.7},
        "penalty": {"r1": 0.7, "r2": 0.3},
    },
    "top k": {"objective": {"top_k": 0.5}},
    "gradient normalisation": {"penalty": {"gradient_normalisation": True}},
    "finite differences": {"penalty": {"r1": 0.7, "r2": 0.3, "form": "finite_difference"}},
    "dragan, consistency, lecam, orthogonal": {
        "penalty": {"dragan": 1.0, "consistency": 1.0, "lecam": 0.1, "orthogonal": 0.01}
    },
}
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{model}, {name}": {"model": SMALL_MODELS[model], "penalty": penalty}
        for model in SMALL_MODELS
        for name, penalty in PENALTIES.items()
    },
    **{
        f"{model}, {name}": {"model": SMALL_MODELS[model], **sections}
        for model in ("dcgan", "stylegan2-classes")
        for name, sections in OTHERS.items()
    },
}


def _gradient(player: Player) -> bytes:
    parts = [p.grad for p in player.module.parameters()]
    assert all(part is not None for part in parts)
    return torch.cat([part.flatten() for part in parts if part is not None]).numpy().tobytes()


def _gradients(world: World) -> dict[str, tuple[bytes, bytes]]:
    """(D's, G's) gradient in every case, on a rank that has every W-th sample."""
    found = {}
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(BATCH_SIZE, 3, 16, 16, generator=generator) * 2 - 1
    labels = torch.arange(BATCH_SIZE) * 7 % 10
    slots = torch.arange(world.rank, BATCH_SIZE, world.world_size)
    for name, sections in CASES.items():
        config = Config(training={"batch_size": BATCH_SIZE}, **sections)
        precision = Precision.resolve("fp32", torch.device("cpu"))
        gan = build_state(config, precision, world).method
        assert isinstance(gan, Gan)
        torch.manual_seed(8)  # not 7, where rounding moves a ReLU of sngan over its kink
        for player in gan.players.values():
            for parameter in player.module.parameters():  # zeros of an initialisation hide much
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
        gan.opponent.feedback.anchors.copy_(torch.tensor([0.3, -0.2]))
        share = Share(
            real_images=images[slots],
            labels=labels[slots] if config.model.num_classes else None,
            random=StepRandomness(3, 640, BATCH_SIZE, slots, torch.device("cpu")),
            z_dim=config.model.z_dim,
            weight=world.world_size / BATCH_SIZE,
        )
        rules = gan.opponent.rules(Moment())
        gan.discriminator_phase(share, rules)
        gan.generator_phase(share, rules)
        found[name] = (_gradient(gan.opponent.player), _gradient(gan.generator))
    return found


@functools.cache
def _of_world(world_size: int) -> list[dict[str, tuple[bytes, bytes]]]:
    return run_ranks(world_size, _gradients)


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case: str, world_size: int) -> None:
    # A finite difference has fewer digits to begin with.
    rtol = 1e-4 if "finite differences" in case else 1e-5
    (alone,) = _of_world(1)
    for rank in _of_world(world_size):
        for found, expected in zip(rank[case], alone[case], strict=True):
            wanted = np.frombuffer(expected, dtype=np.float32).astype(np.float64)
            difference = np.frombuffer(found, dtype=np.float32) - wanted
            assert np.linalg.norm(wanted) > 1e-3
            assert np.linalg.norm(difference) <= rtol * np.linalg.norm(wanted)
