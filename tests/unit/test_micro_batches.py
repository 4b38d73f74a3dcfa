"""How a batch is split, what is done once for all of its parts, and what cannot be split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

from ganscale.config import Config
from ganscale.errors import ConfigError
from ganscale.models.layers import MinibatchStd, SpectralNorm
from ganscale.training.precision import Precision
from ganscale.training.step_inputs import Labelled, LocalBatch, StepInputs
from ganscale.training.steps import METHODS, TrainingMethod
from ganscale.world import World, process_group
from tests.support.gradients import fresh_networks
from tests.support.small_models import SMALL_MODELS
from tests.support.steps import local_batch, recorded_gradients, step_inputs

BATCH_SIZE = 8


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(World()):
        yield


def method_and_batch(
    micro_batch_size: int | None, precision: str = "fp32", **sections: Any
) -> tuple[TrainingMethod, LocalBatch]:
    """A small R3GAN without the zeros of an initialisation, and eight images."""
    training = {"batch_size": BATCH_SIZE, "micro_batch_size": micro_batch_size}
    config = Config(**{"model": SMALL_MODELS["r3gan"], **sections, "training": training})
    policy = Precision.resolve(precision, torch.device("cpu"))
    method = METHODS[config.method.name](config, fresh_networks(config), policy, World())
    torch.manual_seed(3)
    for model in method.models.values():
        for parameter in model.module.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    images = torch.rand(BATCH_SIZE, 3, 16, 16) * 2 - 1
    return method, local_batch(images, torch.arange(BATCH_SIZE))


def tensors_by_sample(inputs: StepInputs) -> list[torch.Tensor]:
    """All that has a row for each sample."""
    batch = inputs.batch
    assert batch.labels is not None
    assert batch.labelled is not None
    labelled = batch.labelled
    return [
        *(batch.real_images, batch.labels, batch.slots, labelled.images, labelled.labels),
        *inputs.noise.values(),
    ]


@pytest.mark.parametrize(
    ("num_samples", "size", "expected"),
    [
        (10, None, [10]),
        (10, 10, [10]),
        (10, 11, [10]),
        (10, 9, [5, 5]),
        (10, 5, [5, 5]),
        (10, 4, [3, 3, 4]),
        (10, 3, [2, 3, 2, 3]),
        (3, 1, [1, 1, 1]),
        (0, 4, [0]),
        (0, None, [0]),
    ],
)
def test_parts_are_as_even_as_possible(
    num_samples: int, size: int | None, expected: list[int]
) -> None:
    rows = torch.arange(num_samples)
    images = rows[:, None, None, None].float()
    batch = LocalBatch(images, rows, rows + 100, 64, 2 / 64, Labelled(images + 0.5, rows + 200))
    inputs = StepInputs(batch, {"z": rows[:, None] + 300}, {"lr_G": torch.tensor(0.1)}, size)
    parts = inputs.micro_batches
    assert [len(part.batch.slots) for part in parts] == expected
    for part in parts:
        assert part.schedules is inputs.schedules
        assert (part.batch.global_size, part.batch.loss_weight) == (64, 2 / 64)
    # Each sample is in one part, with all that belongs to it.
    columns = [tensors_by_sample(part) for part in parts]
    for column, whole in zip(zip(*columns, strict=True), tensors_by_sample(inputs), strict=True):
        assert torch.equal(torch.cat(column), whole)


def test_ranks_average_gradients_once_a_phase() -> None:
    num_buckets = []
    for size in (None, 3, 1):
        method, batch = method_and_batch(size)
        seen: list[int] = []

        # Without annotations, which DDP compares as objects and which are strings here.
        def count(seen, bucket):  # type: ignore[no-untyped-def]
            seen.append(bucket.index())
            future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        for model in method.models.values():
            model.ddp_module.register_comm_hook(seen, count)
        method.step(*step_inputs(method, batch))
        num_buckets.append(len(seen))
    assert num_buckets[0] == num_buckets[1] == num_buckets[2] > 0


def test_ada_and_lecam_take_in_the_whole_batch_once() -> None:
    ada = {"name": "ada", "target": -0.9, "adapt_kimg": 0.1}
    states = []
    for size in (None, 3):
        method, batch = method_and_batch(size, augment=ada, penalty={"lecam": 0.1})
        for step in range(5):  # ADA's p moves at the fourth, and then a new sum begins
            method.step(*step_inputs(method, batch, nimg=step * BATCH_SIZE, step=step))
        states.append(method.state_dict())
    assert states[0]["ada"]["p"] > 0
    assert states[0]["ada"]["signs"] != 0
    assert states[0]["lecam"]["values"].abs().min() > 0
    torch.testing.assert_close(states[1], states[0], rtol=1e-3, atol=1e-6)


def test_gradients_in_fp16_are_added_up_at_one_scale() -> None:
    results: list[dict[str, torch.Tensor]] = []
    for precision, size in (("fp32", None), ("fp16", None), ("fp16", 3)):
        method, batch = method_and_batch(size, precision, penalty={"r1": 0.1})
        with ExitStack() as stack:
            recorded = {
                letter: stack.enter_context(recorded_gradients(model))
                for letter, model in method.models.items()
            }
            method.step(*step_inputs(method, batch))
        assert all(model.num_skips == 0 for model in method.models.values())
        results.append(
            {letter: torch.cat([g.flatten() for g in found]) for letter, found in recorded.items()}
        )
    for letter, exact in results[0].items():
        for half in results[1:]:
            # What half precision itself loses here, whole or in parts, is 2.4 %; gradients that
            # were added up at different scales would be off by the factor between these, 2 or more.
            assert (half[letter] - exact).norm() < 4e-2 * exact.norm()


@pytest.mark.parametrize("bad", range(BATCH_SIZE))
def test_one_bad_sample_skips_the_update_once(bad: int) -> None:
    method, batch = method_and_batch(3, "fp16")
    assert method.discriminator is not None
    model = method.discriminator.model
    before = [parameter.detach().clone() for parameter in model.module.parameters()]
    scale = model.scaler.scale
    batch.real_images[bad] = torch.inf
    method.step(*step_inputs(method, batch))
    assert model.num_skips == 1
    assert model.scaler.scale == scale / 2
    assert all(map(torch.equal, model.module.parameters(), before))
    batch.real_images[bad] = 0
    method.step(*step_inputs(method, batch, step=1))
    assert model.num_skips == 1
    assert not all(map(torch.equal, model.module.parameters(), before))


# Each looks across the samples of a forward, but for spectral norm, which takes a step of its power
# iteration at each forward.
_COUPLING = (nn.BatchNorm2d, MinibatchStd, SpectralNorm)


def options(method: str) -> dict[str, Any]:
    """A method's section with what it cannot do without."""
    more: dict[str, dict[str, Any]] = {
        "encoder": {"generator": "built here"},
        "semi-supervised": {"labels": 20},
    }
    return {"name": method, **more.get(method, {})}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", SMALL_MODELS)
def test_networks_that_look_across_the_batch_are_refused_and_no_others(
    model: str, method: str
) -> None:
    num_classes = {"semi-supervised": {"num_classes": 10}, "bigan": {"num_classes": 0}}
    spec = SMALL_MODELS[model] | num_classes.get(method, {})
    try:
        config = Config().with_changes({"model": spec, "method": options(method)})
    except ConfigError:
        return  # this method has no such model anyway
    parts = [part for net in fresh_networks(config).values() for part in net.modules()]
    if any(isinstance(part, _COUPLING) for part in parts):
        with pytest.raises(ConfigError, match=r"micro_batch_size=4 would .* the whole batch"):
            config.with_changes({"training.micro_batch_size": 4})
    else:
        assert spec["name"] in ("r3gan", "stylegan2")
        config.with_changes({"training.micro_batch_size": 4})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"model": {**SMALL_MODELS["dcgan"], "num_classes": 0}},
            ["model.name=dcgan", "batch norm", "launch.num_workers"],
        ),
        ({"model": SMALL_MODELS["stylegan2"]}, ["model.name=stylegan2", "set model.name=r3gan"]),
        ({"method.name": "vae"}, ["method.name=vae", "encoders", "leave it null"]),
        (
            {"objective.name": "relativistic_average"},
            ["objective.name=relativistic_average", "set objective.name=relativistic,"],
        ),
        ({"objective.top_k": 0.5}, ["objective.top_k", "leave objective.top_k"]),
        ({"training.shared_fakes": True}, ["set training.shared_fakes=false"]),
    ],
)
def test_what_takes_the_whole_batch_is_refused_with_what_to_set(
    changes: dict[str, Any], named: list[str]
) -> None:
    base = Config(model=SMALL_MODELS["r3gan"]).with_changes(changes)
    with pytest.raises(ConfigError, match=r"training\.micro_batch_size=4 ") as error:
        base.with_changes({"training.micro_batch_size": 4})
    assert all(part in str(error.value) for part in named)


def test_a_micro_batch_has_at_least_one_image() -> None:
    with pytest.raises(ConfigError, match="micro_batch_size"):
        Config().with_changes({"training.micro_batch_size": 0})
