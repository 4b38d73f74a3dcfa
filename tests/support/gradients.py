"""The gradients that one step of any method takes, on one rank or on several."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ganscale.config import Config
from ganscale.models import build_discriminator, build_encoder, build_generator
from ganscale.training.precision import Precision
from ganscale.training.step_inputs import Labelled, LocalBatch
from ganscale.training.steps import METHODS, TrainingMethod
from ganscale.world import World
from tests.support.steps import local_batch, step_inputs

BATCH_SIZE = 10
_STILL = {"optimizer": {"eps": 1e6}}  # updates too small to matter to who learns next


class StepResult(NamedTuple):
    """What a step did, as plain Python that crosses between processes."""

    gradients: dict[str, bytes]
    """float32, by the models' letters."""
    statistics: dict[str, float]


def fresh_networks(config: Config) -> dict[str, nn.Module]:
    """The networks of a method; an encoder's generator is built here instead of loaded."""
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


def steps_of_cases(
    world: World,
    cases: Mapping[str, dict[str, Any]],
    places: Sequence[Sequence[int]] | None = None,
    weights: int = 8,
) -> dict[str, StepResult]:
    """One step of each case on a batch of ten, of which a rank has the samples at its `places`.

    Without `places` it has every W-th. A case is sections of a configuration; `weights` is a seed.
    """
    found, device = {}, world.torch_device
    generator = torch.Generator().manual_seed(5)
    images = (torch.rand(BATCH_SIZE, 3, 16, 16, generator=generator) * 2 - 1).to(device)
    labels = (torch.arange(BATCH_SIZE) * 7 % 10).to(device)
    slots = torch.arange(world.rank, BATCH_SIZE, world.world_size)
    if places is not None:
        slots = torch.tensor(places[world.rank], dtype=torch.int64)
    for name, sections in cases.items():
        training = {"batch_size": BATCH_SIZE, **sections.get("training", {})}
        config = Config(**{**sections, **_STILL, "training": training})
        precision = Precision.resolve("fp32", device)
        method = METHODS[config.method.name](config, fresh_networks(config), precision, world)
        torch.manual_seed(weights)  # not 7, where rounding moves a ReLU of sngan over its kink
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
        found[name] = _step(method, batch)
    return found


def relative_difference(gradient: bytes, expected: bytes) -> float:
    """Norm of the difference over the norm of what is expected, which must not be next to zero."""
    wanted = np.frombuffer(expected, dtype=np.float32).astype(np.float64)
    assert np.linalg.norm(wanted) > 1e-3
    difference = np.frombuffer(gradient, dtype=np.float32) - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted))


def _step(method: TrainingMethod, batch: LocalBatch) -> StepResult:
    gradients: dict[str, bytes] = {}
    for letter, model in method.models.items():
        model.optimizer.register_step_pre_hook(functools.partial(_record, gradients, letter))
    statistics = method.step(*step_inputs(method, batch, seed=3, nimg=640))
    assert gradients.keys() == method.models.keys()
    return StepResult(gradients, {name: float(value) for name, value in statistics.items()})


def _record(
    gradients: dict[str, bytes], letter: str, optimizer: torch.optim.Optimizer, *_: object
) -> None:
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    parts = [p.grad for p in weights if p.requires_grad]
    assert all(part is not None for part in parts)
    gradient = torch.cat([part.flatten() for part in parts if part is not None])
    gradients[letter] = gradient.cpu().numpy().tobytes()
