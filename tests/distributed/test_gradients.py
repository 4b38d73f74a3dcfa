"""All players' gradients are those of one process on the whole batch, whatever the loss."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from ganscale.world import World, process_group
from tests.support.gradients import BATCH_SIZE, StepResult, relative_difference, steps_of_cases
from tests.support.ranks import run_ranks
from tests.support.small_models import SMALL_MODELS

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
    "shared fakes": {"training": {"shared_fakes": True}},
    "gradient normalisation": {"penalty": {"gradient_normalisation": True}},
    "finite differences": {"penalty": {"r1": 0.7, "r2": 0.3, "form": "finite_difference"}},
    "dragan, consistency, lecam": {"penalty": {"dragan": 1.0, "consistency": 1.0, "lecam": 0.1}},
    "orthogonal": {"penalty": {"orthogonal": 0.01}},
}
OTHER_METHODS: dict[str, dict[str, Any]] = {
    "vae": {"beta": 0.7},
    "vae-gan": {"beta": 0.7, "adversarial": 0.3},
    "encoder": {"generator": "built here", "adversarial": 0.3},
    "bigan": {},
}
SEMI_SUPERVISED: dict[str, Any] = {
    "model": {**SMALL_MODELS["dcgan"], "num_classes": 10},
    "method": {"name": "semi-supervised", "labels": 20},
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
        if not (name == "orthogonal" and model.startswith("stylegan2"))
    },
    **{
        f"{model}, {name}": {"model": SMALL_MODELS[model], "method": {"name": name, **options}}
        for model in ("dcgan", "stylegan2-classes")
        for name, options in OTHER_METHODS.items()
        if not (name == "bigan" and SMALL_MODELS[model].get("num_classes"))
    },
    "dcgan, vae-gan, relativistic average, augmented, R1": {
        "model": SMALL_MODELS["dcgan"],
        "method": {"name": "vae-gan"},
        "objective": {"name": "relativistic_average"},
        "augment": {"name": "r3gan", "p": 0.7},
        "penalty": {"r1": 0.7},
    },
    "dcgan, semi-supervised": SEMI_SUPERVISED,
    "dcgan, semi-supervised, augmented, R1": {
        **SEMI_SUPERVISED,
        "augment": {"name": "r3gan", "p": 0.7},
        "penalty": {"r1": 0.7},
    },
    "dcgan, bigan, relativistic average": {
        "model": SMALL_MODELS["dcgan"],
        "method": {"name": "bigan"},
        "objective": {"name": "relativistic_average"},
    },
}


_CASES_OF_AN_EMPTY_RANK = [f"{model}, R1" for model in SMALL_MODELS]


def _steps_of_rank(world: World) -> dict[str, StepResult]:
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    return steps_of_cases(world, CASES)


@functools.cache
def _of_world(world_size: int, device: str = "cpu") -> list[dict[str, StepResult]]:
    return run_ranks(world_size, _steps_of_rank, device=device)


@pytest.mark.parametrize(
    ("world_size", "device"),
    [
        pytest.param(2, "cpu", marks=pytest.mark.slow),
        (3, "cpu"),  # uneven parts of the batch, so it shows what two and four would
        pytest.param(4, "cpu", marks=pytest.mark.slow),
        pytest.param(2, "cuda:0", marks=pytest.mark.gpu),  # both ranks on one GPU
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case: str, world_size: int, device: str) -> None:
    # A finite difference has fewer digits to begin with. On CUDA, kernels are chosen by the size of
    # the batch and sum in other orders; 1e-3 is also what is asked of CUDA against the CPU.
    rtol = 1e-4 if "finite differences" in case else 1e-5
    rtol = rtol if device == "cpu" else 1e-3
    (alone,) = _of_world(1, device)
    for rank in _of_world(world_size, device):
        for player, expected in alone[case].gradients.items():
            assert relative_difference(rank[case].gradients[player], expected) <= rtol


@functools.cache
def _of_one_of_two() -> list[dict[str, StepResult]]:
    """The first rank has the whole batch; of the second, every sample was left out."""
    cases = {name: CASES[name] for name in _CASES_OF_AN_EMPTY_RANK}
    return run_ranks(2, steps_of_cases, cases, (range(BATCH_SIZE), ()))


@pytest.mark.parametrize("case", _CASES_OF_AN_EMPTY_RANK)
def test_a_rank_without_samples_has_the_gradients_of_the_others(case: str) -> None:
    (alone,) = _of_world(1)
    for rank in _of_one_of_two():
        for player, expected in alone[case].gradients.items():
            assert relative_difference(rank[case].gradients[player], expected) <= 1e-5


@functools.cache
def _of_device(device: str) -> dict[str, StepResult]:
    world = World(device=device)
    with process_group(world):
        return steps_of_cases(world, CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gradients_on_cuda_are_the_cpus(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cudnn.conv.fp32_precision", "ieee")
    for player, expected in _of_device("cpu")[case].gradients.items():
        found = _of_device("cuda:0")[case].gradients[player]
        assert relative_difference(found, expected) <= 1e-3
