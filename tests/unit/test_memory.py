"""Memory that is counted without computing, against that of steps which compute."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ganscale.config import Config
from ganscale.data.order import Order
from ganscale.errors import ConfigError, GanscaleError
from ganscale.training.build import build_state
from ganscale.training.dry_run import describe_plan
from ganscale.training.loop import train
from ganscale.training.memory import (
    estimate_memory,
    largest_local_batch,
    out_of_memory_message,
    saved_for_backward,
)
from ganscale.training.precision import LossScaler, Precision
from ganscale.training.step_graphs import StepRunner
from ganscale.training.step_inputs import Labelled
from ganscale.training.steps import METHODS, TrainingMethod
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.gradients import fresh_networks
from tests.support.small_models import SMALL_MODELS
from tests.support.steps import local_batch, step_inputs

CLASSES = {**SMALL_MODELS["dcgan"], "num_classes": 10}
CASES: dict[str, dict[str, Any]] = {
    "dcgan": {},
    "sngan, relativistic average": {
        "model": SMALL_MODELS["sngan"],
        "objective": {"name": "relativistic_average", "top_k": 0.5},
    },
    "biggan, gradient normalisation": {
        "model": SMALL_MODELS["biggan"],
        "penalty": {"gradient_normalisation": True},
    },
    "r3gan, R1 and R2": {
        "model": SMALL_MODELS["r3gan"],
        "objective": {"name": "relativistic"},
        "augment": {"name": "r3gan", "p": 0.5},
        "penalty": {"r1": 0.1, "r2": 0.1},
    },
    "stylegan2, lazy R1, ADA, LeCam": {
        "model": SMALL_MODELS["stylegan2-classes"],
        "penalty": {"r1": 0.1, "interval": 4, "lecam": 0.1},
        "augment": {"name": "ada", "target": 0.6},
    },
    "WGAN-GP, dragan, consistency": {
        "penalty": {"wgan_gp": 1.0, "dragan": 1.0, "consistency": 1.0}
    },
    "finite differences": {"penalty": {"r1": 0.1, "form": "finite_difference"}},
    "half precision": {"training": {"precision": "bf16"}},
    "shared fakes": {"training": {"shared_fakes": True}},
    "vae": {"method": {"name": "vae"}},
    "vae-gan": {"method": {"name": "vae-gan"}},
    "bigan": {"method": {"name": "bigan"}},
    "encoder": {"method": {"name": "encoder", "generator": "built here"}},
    "semi-supervised": {"model": CLASSES, "method": {"name": "semi-supervised", "labels": 20}},
    "labels alone": {
        "model": CLASSES,
        "method": {"name": "semi-supervised", "labels": 20, "adversarial": 0},
    },
}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(World()):
        yield


def configured(sections: dict[str, Any], **training: Any) -> Config:
    training = {"precision": "fp32", "batch_size": 6} | sections.get("training", {}) | training
    return Config(**{"model": SMALL_MODELS["dcgan"], **sections, "training": training})


def built(config: Config) -> TrainingMethod:
    precision = Precision.resolve(config.training.precision, torch.device("cpu"))
    return METHODS[config.method.name](config, fresh_networks(config), precision, World())


class Held:
    """A saved tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def held_in_a_step(
    method: TrainingMethod, num_images: int, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Bytes that the graph of a step with data holds where each backward begins."""
    config = method.config
    size = config.model.resolution
    images = torch.rand(num_images, 3, size, size) * 2 - 1
    labels = torch.arange(num_images)
    batch = local_batch(
        images,
        labels if config.generator_spec["num_classes"] else None,
        labelled=Labelled(images.flip(0), labels),
    )
    inputs, variant = step_inputs(method, batch)
    weights = {
        tensor.untyped_storage().data_ptr()
        for model in method.models.values()
        for tensor in (*model.module.parameters(), *model.module.buffers())
    }
    held: weakref.WeakSet[Held] = weakref.WeakSet()
    found = []
    backward = LossScaler.backward

    def counted(scaler: LossScaler, loss: Tensor) -> None:
        sizes = {}
        for holder in held:
            storage = holder.tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
        found.append(sum(sizes.values()))
        backward(scaler, loss)

    def hold(tensor: Tensor) -> Held:
        held.add(holder := Held(tensor.detach()))
        return holder

    with monkeypatch.context() as patch:
        patch.setattr(LossScaler, "backward", counted)
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda holder: holder.tensor):
            method.step(inputs, variant)
    return found


@pytest.mark.parametrize("case", CASES)
def test_activations_are_those_that_a_step_keeps(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(CASES[case])
    expected = held_in_a_step(built(config), 6, monkeypatch)
    counted = saved_for_backward(built(config), 6)
    assert [*counted.values()] == expected
    assert min(expected) > 0


def test_activations_grow_with_the_images_and_by_nothing_else() -> None:
    method = built(configured(CASES["r3gan, R1 and R2"]))
    three, six, nine = (saved_for_backward(method, size) for size in (3, 6, 9))
    for phase, size in six.items():
        assert nine[phase] - size == size - three[phase] > 0


def state_after_a_step(config: Config) -> int:
    """Bytes of all that lasts, weights and their gradients included."""
    state = build_state(config, Precision("fp32", "cpu"), World())
    images = torch.rand(config.training.batch_size, 3, 16, 16) * 2 - 1
    labels = torch.arange(len(images))
    batch = local_batch(images, labels, labelled=Labelled(images, labels))
    state.method.step(*step_inputs(state.method, batch))
    num_bytes = 0
    for model in state.method.models.values():
        weights = [*model.module.parameters(), *model.module.buffers()]
        moments = [m for values in model.optimizer.state.values() for m in values.values()]
        num_bytes += sum(t.nbytes for t in weights)
        num_bytes += sum(t.nbytes for t in moments if t.ndim > 0)  # and no counts of steps
        # The buckets of DDP, in which gradients lie, are where they were found in the backward.
        num_bytes += sum(p.nbytes for p in model.module.parameters() if p.requires_grad)
    for ema in state.emas.values():
        num_bytes += sum(t.nbytes for t in (*ema.model.parameters(), *ema.model.buffers()))
    return num_bytes


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"extra_ema_halflives_kimg": [1, 2]}},
        {"method": {"name": "vae-gan"}},
        CASES["r3gan, R1 and R2"],
        CASES["semi-supervised"],
    ],
)
def test_the_state_is_what_a_run_has(sections: dict[str, Any]) -> None:
    config = configured(sections)
    found = estimate_memory(config, fresh_networks(config)).state
    assert found == state_after_a_step(config)


def test_a_generator_that_does_not_learn_has_neither_gradients_nor_moments() -> None:
    config = configured(CASES["encoder"])
    networks = fresh_networks(config)
    sizes = {
        name: sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
        for name, net in networks.items()
    }
    learning = sum(p.nbytes for n in ("encoder", "discriminator") for p in networks[n].parameters())
    averages = sizes["encoder"] + sizes["generator"]
    state = sum(sizes.values()) + 3 * learning + averages
    assert estimate_memory(config, networks).state == state


def test_micro_batches_keep_less_and_a_network_s_gradients_twice() -> None:
    found = {}
    for size in (None, 4, 2):
        config = configured(CASES["r3gan, R1 and R2"], batch_size=16, micro_batch_size=size)
        found[size] = estimate_memory(config, fresh_networks(config))
    assert [found[size].num_images for size in (None, 4, 2)] == [16, 4, 2]
    largest = max(
        sum(p.nbytes for p in net.parameters()) for net in fresh_networks(config).values()
    )
    assert found[4].state == found[2].state == found[None].state + largest
    for phase, whole in found[None].activations.items():
        assert found[2].activations[phase] < found[4].activations[phase] < whole / 2


def test_workers_share_a_batch_and_micro_batches_are_even() -> None:
    config = configured({"model": SMALL_MODELS["r3gan"]}, batch_size=40, micro_batch_size=8)
    config = config.with_changes({"launch.num_workers": 2})
    # Twenty images a worker, in three parts of 6, 7 and 7.
    assert estimate_memory(config, fresh_networks(config)).num_images == 7


@pytest.mark.parametrize("num_workers", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("batch_size", [5, 8, 19, 24])
def test_the_largest_part_of_a_batch_is_that_of_the_order(
    batch_size: int, num_workers: int
) -> None:
    order = Order([400] * 8, num_streams=8, window=400, seed=0)
    sizes = [
        len(order.local_batch(position, batch_size, rank=rank, world_size=num_workers))
        for rank in range(num_workers)
        for position in range(2 * order.num_streams)
    ]
    assert largest_local_batch(batch_size, order.num_streams, num_workers) == max(sizes)


def test_workers_that_do_not_divide_the_streams_have_unequal_parts() -> None:
    config = configured({"model": SMALL_MODELS["r3gan"]}, batch_size=640)
    config = config.with_changes({"launch.num_workers": 48})
    counted = [
        estimate_memory(config, fresh_networks(config), num_streams).num_images
        for num_streams in (64, 48, None)
    ]
    assert counted == [20, 14, 14]


def test_a_plan_says_what_memory_is_for(make_config: MakeConfig) -> None:
    config = make_config(training__precision="bf16", training__batch_size=16)
    lines = describe_plan(config)
    assert any(line.startswith("weights, gradients, optimizers and averages: ") for line in lines)
    (activations,) = [line for line in lines if line.startswith("activations of 16 images in bf16")]
    assert "discriminator" in activations
    assert "generator" in activations
    assert any("workspaces of kernels" in line for line in lines)


def test_a_plan_refuses_shards_that_training_would_refuse(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"set model.img_channels=3 model.resolution=32"):
        describe_plan(make_config(model__resolution=64))
    with pytest.raises(ConfigError, match=r"launch.num_workers=16 is more than the 12 streams"):
        describe_plan(make_config(launch__num_workers=16, training__batch_size=64))


@pytest.mark.parametrize(
    ("sections", "changes", "expected"),
    [
        ({"model": SMALL_MODELS["r3gan"]}, {}, "set training.micro_batch_size=64,"),
        (
            {"model": SMALL_MODELS["r3gan"]},
            {"training.micro_batch_size": 10},
            "set training.micro_batch_size=5,",
        ),
        (
            {"model": SMALL_MODELS["r3gan"]},
            {"training.micro_batch_size": 1},
            "a smaller model, and another name=",
        ),
        ({}, {}, "set a smaller training.batch_size, and another name=.*batch norm"),
    ],
)
def test_a_step_that_does_not_fit_is_told_with_what_to_set(
    make_config: MakeConfig, sections: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    config = make_config(**sections, training__batch_size=128).with_changes(changes)
    size = changes.get("training.micro_batch_size", 128)
    message = out_of_memory_message(config, "cuda:0", 79.1)
    begin = f"a step of {size} images at once does not fit on cuda:0, which has 79.1 GiB: "
    assert message.startswith(begin)
    assert re.search(expected, message)


def test_training_ends_with_that_message(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(StepRunner, "run", run)
    # A `GanscaleError` is not tried again, as other errors of workers are.
    with process_group(World()), pytest.raises(GanscaleError, match="16 images at once does not"):
        train(make_config(), World())
