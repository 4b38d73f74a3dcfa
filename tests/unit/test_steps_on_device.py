"""A step stays on the device: no host read, no tensor of host data, no random draw inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ganscale.config import Config
from ganscale.models import build_discriminator, build_encoder, build_generator
from ganscale.training.precision import Precision
from ganscale.training.step_inputs import Labelled, StepVariant
from ganscale.training.steps import METHODS, TrainingMethod
from ganscale.world import World, process_group
from tests.support.device_only import HostAccess, device_only
from tests.support.small_models import SMALL_MODELS
from tests.support.steps import local_batch, step_inputs

BATCH_SIZE = 8
CLASSES = {**SMALL_MODELS["dcgan"], "num_classes": 10}
MOVING = {"start": 1.0, "end": 0.5, "kimg": 1, "shape": "linear"}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"model": model} for name, model in SMALL_MODELS.items()},
    "lazy penalties, two discriminator steps": {
        "penalty": {"r1": MOVING, "r2": 0.1, "interval": 2},
        "training": {"discriminator_steps": 2},
    },
    "penalties with noise": {
        "penalty": {"wgan_gp": 1.0, "dragan": 1.0, "consistency": 1.0, "orthogonal": 1e-3}
    },
    "finite differences": {"penalty": {"r1": 0.1, "r2": 0.1, "form": "finite_difference"}},
    "ADA and LeCam": {"augment": {"name": "ada", "target": 0.6}, "penalty": {"lecam": 0.1}},
    "schedules": {
        "augment": {"name": "r3gan", "p": MOVING},
        "objective": {"name": "relativistic_average", "top_k": MOVING},
        "optimizer": {"lr": MOVING, "beta2": {**MOVING, "start": 0.9}, "clip_norm": 1.0},
    },
    "DiffAugment, clipped": {
        "augment": {"name": "diffaugment", "p": 1},
        "objective": {"name": "wasserstein"},
        "optimizer": {"clip_weights": 0.01, "clip_value": 0.1},
    },
    "gradient normalisation": {"penalty": {"gradient_normalisation": True}},
    "fp16": {"training": {"precision": "fp16"}},
    "shared fakes": {"training": {"shared_fakes": True}},
    "micro-batches, ADA and LeCam, lazy penalties": {
        "model": SMALL_MODELS["r3gan"],
        "objective": {"name": "relativistic"},
        "augment": {"name": "ada", "target": 0.6},
        "penalty": {"r1": MOVING, "r2": 0.1, "lecam": 0.1, "orthogonal": 1e-3, "interval": 2},
        "training": {"micro_batch_size": 3, "discriminator_steps": 2},
    },
    "vae": {"method": {"name": "vae"}},
    "vae-gan": {"method": {"name": "vae-gan"}},
    "bigan": {"method": {"name": "bigan"}},
    "encoder": {"method": {"name": "encoder", "generator": "built here"}},
    "semi-supervised": {"model": CLASSES, "method": {"name": "semi-supervised", "labels": 20}},
    "semi-supervised, micro-batches": {
        "model": SMALL_MODELS["stylegan2-classes"],
        "method": {"name": "semi-supervised", "labels": 20},
        "training": {"micro_batch_size": 3},
    },
    "labels alone": {
        "model": CLASSES,
        "method": {"name": "semi-supervised", "labels": 20, "adversarial": 0},
    },
}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(World()):
        yield


def built(sections: dict[str, Any]) -> tuple[Config, TrainingMethod]:
    training = {"batch_size": BATCH_SIZE, "precision": "fp32", **sections.get("training", {})}
    config = Config(**{"model": SMALL_MODELS["dcgan"], **sections, "training": training})
    kind, spec = METHODS[config.method.name], config.model.model_dump()
    networks: dict[str, nn.Module] = (
        {
            "generator": build_generator(spec),
            "encoder": build_encoder(spec),
            "discriminator": build_discriminator(spec),
        }
        if config.method.name == "encoder"
        else kind.networks(config)
    )
    precision = Precision.resolve(config.training.precision, torch.device("cpu"))
    return config, kind(config, networks, precision, World())


@pytest.mark.parametrize("case", CASES)
def test_a_step_neither_reads_from_the_device_nor_copies_to_it(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, method = built(CASES[case])
    images = torch.rand(BATCH_SIZE, 3, 16, 16) * 2 - 1
    labels = torch.arange(BATCH_SIZE)
    batch = local_batch(
        images,
        labels if config.generator_spec["num_classes"] else None,
        labelled=Labelled(images.flip(0), labels),
    )
    variants: set[StepVariant] = set()
    for step in range(4):  # the first steps make what is made once: moments, filters, scales
        inputs, variant = step_inputs(
            method,
            batch,
            nimg=step * BATCH_SIZE,
            step=step,
            discriminator_steps=config.training.discriminator_steps,
        )
        if variant in variants or step >= 2:
            with device_only(monkeypatch):
                statistics = method.step(inputs, variant)
        else:
            statistics = method.step(inputs, variant)
        variants.add(variant)
        assert set(statistics) <= set(method.statistics)
        assert all(value.shape == () for value in statistics.values())
    assert len(variants) == (2 if "lazy" in case else 1)


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.item(),
    "float": float,
    "int": int,
    "bool": bool,
    "comparison": lambda x: 1 if x > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "index": lambda x: torch.zeros(3)[x.long()],
    "mask": lambda x: torch.ones(3)[torch.ones(3) > x],
    "tensor": lambda x: x + torch.tensor(1.0),
    "new_tensor": lambda x: x + x.new_tensor([1.0]),
    "as_tensor": lambda x: x + torch.as_tensor(1.0),
    "draw": lambda x: x + torch.rand(1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_guard_sees_what_is_put_in_on_purpose(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, method = built({})
    images = torch.rand(BATCH_SIZE, 3, 16, 16) * 2 - 1
    inputs, variant = step_inputs(method, local_batch(images))
    method.step(inputs, variant)
    assert method.discriminator is not None
    features = method.discriminator.model.module

    def forward(module: nn.Module, args: Any, output: Tensor) -> None:
        FAULTS[fault](output.detach().mean())

    features.register_forward_hook(forward)
    with pytest.raises(HostAccess), device_only(monkeypatch):
        method.step(inputs, variant)
    assert torch.tensor(1.0).item() == 1  # nothing stays patched
