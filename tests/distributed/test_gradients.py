"""All players' gradients are those of one process on the whole batch, whatever the loss."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ganscale.config import Config
from ganscale.models import build_discriminator, build_encoder, build_generator
from ganscale.training.inputs import Labelled, LocalBatch
from ganscale.training.precision import Precision
from ganscale.training.steps import METHODS, TrainingMethod
from ganscale.world import World, process_group
from tests.support.ranks import run_ranks
from tests.support.small_models import SMALL_MODELS
from tests.support.steps import local_batch, step_inputs

BATCH_SIZE = 10
STILL = {"optimizer": {"eps": 1e6}}  # updates too small to matter to who learns next
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
    "dragan, consistency, lecam, orthogonal": {
        "penalty": {"dragan": 1.0, "consistency": 1.0, "lecam": 0.1, "orthogonal": 0.01}
    },
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


def _networks(config: Config) -> dict[str, nn.Module]:
    torch.manual_seed(config.seed)
    spec = config.model.model_dump()
    kind = METHODS[config.method.name]
    if config.method.name != "encoder":
        return kind.networks(config)
    return {
        "generator": build_generator(spec),
        "encoder": build_encoder(spec),
        "discriminator": build_discriminator(spec),
    }


def _gradients(world: World) -> dict[str, dict[str, bytes]]:
    """Each player's gradient in one step of every case, on a rank that has every W-th sample."""
    found, device = {}, world.torch_device
    generator = torch.Generator().manual_seed(5)
    images = (torch.rand(BATCH_SIZE, 3, 16, 16, generator=generator) * 2 - 1).to(device)
    labels = (torch.arange(BATCH_SIZE) * 7 % 10).to(device)
    slots = torch.arange(world.rank, BATCH_SIZE, world.world_size)
    for name, sections in CASES.items():
        training = {"batch_size": BATCH_SIZE, **sections.get("training", {})}
        config = Config(**{**sections, **STILL, "training": training})
        precision = Precision.resolve("fp32", device)
        method = METHODS[config.method.name](config, _networks(config), precision, world)
        torch.manual_seed(8)  # not 7, where rounding moves a ReLU of sngan over its kink
        for model in method.models.values():
            for parameter in model.module.parameters():  # zeros of an initialisation hide much
                parameter.data.add_(0.1 * torch.randn(parameter.shape).to(device))
        discriminator = method.discriminator
        if discriminator is not None and discriminator.lecam is not None:
            discriminator.lecam.values.copy_(torch.tensor([0.3, -0.2]))
        batch = local_batch(
            images[slots],
            labels[slots] if config.generator_spec["num_classes"] else None,
            slots=slots,
            global_size=BATCH_SIZE,
            world_size=world.world_size,
            labelled=Labelled(images.flip(0)[slots], labels[slots]),
        )
        found[name] = _gradients_of_step(method, batch)
    return found


def _gradients_of_step(method: TrainingMethod, batch: LocalBatch) -> dict[str, bytes]:
    """By the models' letters."""
    found: dict[str, bytes] = {}
    for letter, model in method.models.items():
        model.optimizer.register_step_pre_hook(functools.partial(_record, found, letter))
    method.step(*step_inputs(method, batch, seed=3, nimg=640))
    assert found.keys() == method.models.keys()
    return found


def _record(
    found: dict[str, bytes], letter: str, optimizer: torch.optim.Optimizer, *_: object
) -> None:
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    parts = [p.grad for p in weights if p.requires_grad]
    assert all(part is not None for part in parts)
    gradient = torch.cat([part.flatten() for part in parts if part is not None])
    found[letter] = gradient.cpu().numpy().tobytes()


def _gradients_of_rank(world: World) -> dict[str, dict[str, bytes]]:
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    return _gradients(world)


@functools.cache
def _of_world(world_size: int, device: str = "cpu") -> list[dict[str, dict[str, bytes]]]:
    return run_ranks(world_size, _gradients_of_rank, device=device)


@pytest.mark.parametrize(
    ("world_size", "device"),
    [
        (2, "cpu"),
        (3, "cpu"),
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
        for player, expected in alone[case].items():
            wanted = np.frombuffer(expected, dtype=np.float32).astype(np.float64)
            difference = np.frombuffer(rank[case][player], dtype=np.float32) - wanted
            assert np.linalg.norm(wanted) > 1e-3
            assert np.linalg.norm(difference) <= rtol * np.linalg.norm(wanted)


@functools.cache
def _of_device(device: str) -> dict[str, dict[str, bytes]]:
    world = World(device=device)
    with process_group(world):
        return _gradients(world)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gradients_on_cuda_are_the_cpus(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cudnn.conv.fp32_precision", "ieee")
    for player, expected in _of_device("cpu")[case].items():
        wanted = np.frombuffer(expected, dtype=np.float32).astype(np.float64)
        found = np.frombuffer(_of_device("cuda:0")[case][player], dtype=np.float32)
        assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)
