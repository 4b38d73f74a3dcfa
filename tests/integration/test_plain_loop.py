"""The plain loop does ganscale's arithmetic, so a difference in speed is not one of work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.plain_loop import PlainLoop, plain_loop_obstacle
from ganscale.models.layers import at_least_fp32
from ganscale.training.precision import Precision
from ganscale.training.step_inputs import StepInputs
from ganscale.training.steps.gan import Gan
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.small_models import SMALL_MODELS
from tests.support.steps import local_batch, step_inputs

BATCH_SIZE = 6
CASES: dict[str, dict[str, Any]] = {
    "dcgan": {"model": SMALL_MODELS["dcgan"]},
    "dcgan, shared fakes": {
        "model": SMALL_MODELS["dcgan"],
        "training__shared_fakes": True,
    },
    "sngan with classes, hinge, two discriminator steps": {
        "model": SMALL_MODELS["sngan-classes"],
        "objective__name": "hinge",
        "training__discriminator_steps": 2,
        "optimizer__lr_discriminator": 3e-3,
        "optimizer__beta1": 0.0,
    },
}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(World()):
        yield


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_the_plain_loop_is_one_of_training(
    make_config: MakeConfig, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Adam with a large epsilon is close to plain gradient descent: where a gradient is rounding
    # error alone, its sign would otherwise decide the update.
    config = make_config(
        **CASES[case], optimizer__eps=1e-2, training__batch_size=BATCH_SIZE, optimizer__lr=1e-2
    )
    torch.manual_seed(0)
    plain = PlainLoop(config, World())
    spec = config.generator_spec
    method = Gan(config, Gan.networks(config), Precision.resolve("fp32", plain.device), World())
    assert method.discriminator is not None
    pairs = [
        (method.generator.module, plain.generator),
        (method.discriminator.model.module, plain.discriminator),
    ]
    for ours, its in pairs:
        ours.load_state_dict(its.state_dict())
    generator = torch.Generator().manual_seed(1)
    num_turns = config.training.discriminator_steps
    given: list[StepInputs] = []
    for turn in range(num_turns):
        images = torch.rand(BATCH_SIZE, 3, 16, 16, generator=generator) * 2 - 1
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.arange(BATCH_SIZE) % 10 if spec["num_classes"] else None
        inputs, variant = step_inputs(
            method,
            local_batch(images, labels),
            nimg=turn * BATCH_SIZE,
            step=turn,
            discriminator_steps=num_turns,
        )
        given.append(inputs)
        method.step(inputs, variant)
    batches = iter([(inputs.batch.real_images, inputs.batch.labels) for inputs in given])
    names = ["D z"] * num_turns + ([] if config.training.shared_fakes else ["G z"])
    turns = [*given, given[-1]]
    latents = iter([turns[place].noise[name] for place, name in enumerate(names)])
    monkeypatch.setattr(plain, "_real_batch", lambda: next(batches))
    monkeypatch.setattr(plain, "_latents", lambda: next(latents))
    plain.step()
    for ours, its in pairs:
        state = its.state_dict()
        for name, value in ours.state_dict().items():
            # Our batch norm merges statistics in another order, so the last digits may differ, and
            # with them the gradients of biases before a batch norm, which are rounding error alone.
            torch.testing.assert_close(
                at_least_fp32(value), at_least_fp32(state[name]), rtol=1e-4, atol=1e-5, msg=name
            )


def test_it_trains_for_some_seconds(make_config: MakeConfig) -> None:
    plain = PlainLoop(make_config(), World())
    before = [p.detach().clone() for p in plain.generator.parameters()]
    assert plain.images_per_second(0.2) > 0
    after = plain.generator.parameters()
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({"penalty__r1": 1.0}, "no penalties"),
        ({"augment__name": "diffaugment", "augment__p": 1.0}, "no augmentation"),
        ({"method__name": "vae"}, "no method.name=vae"),
        ({"objective__name": "relativistic"}, "no objective.name=relativistic"),
        ({"optimizer__clip_norm": 1.0}, "no clipping"),
    ],
)
def test_what_it_cannot_train_is_refused(
    make_config: MakeConfig, changes: dict[str, Any], obstacle: str
) -> None:
    config = make_config(**changes)
    assert obstacle in plain_loop_obstacle(config)
    with pytest.raises(ValueError, match=obstacle):
        PlainLoop(config, World())
