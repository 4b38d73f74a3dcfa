"""What a penalty's inner gradient leaves out, and that its outer one is the same without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ganscale.config import Config
from ganscale.models import build_discriminator
from ganscale.models.input_gradients import are_parameters_wanted, input_gradients_only
from ganscale.training.optimized_model import distribute
from ganscale.world import World, process_group
from tests.support.small_models import SMALL_MODELS


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(World()):
        yield


class _WeightGradients(TorchDispatchMode):
    """Counts the convolutions that make gradients of weights."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.num += args[-1][1]
        return func(*args, **(kwargs or {}))


@contextmanager
def all_gradients() -> Iterator[None]:
    yield


def r1_gradients(network: nn.Module, *, skip: bool) -> tuple[list[Tensor], int]:
    """The gradients of logits and R1 by all weights; the weight gradients made on the way there."""
    torch.manual_seed(1)
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    labels = torch.arange(4)
    logits = network(images, labels)
    with input_gradients_only() if skip else all_gradients(), _WeightGradients() as counted:
        (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    loss = logits.sum() + slope.square().sum()
    return list(torch.autograd.grad(loss, list(network.parameters()))), counted.num


@pytest.mark.parametrize("model", SMALL_MODELS)
def test_a_penalty_has_the_same_bits_and_makes_no_weight_gradients_on_the_way(model: str) -> None:
    torch.manual_seed(0)
    spec = Config(model=SMALL_MODELS[model]).model.model_dump()
    network, _ = distribute(build_discriminator(spec), World())
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    expected, num_before = r1_gradients(network, skip=False)
    network.load_state_dict(state)  # power iterations and batch statistics move with each forward
    found, num = r1_gradients(network, skip=True)
    assert (num_before > 0, num) == (True, 0)
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value, other)


def test_blocks_nest_and_end_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), input_gradients_only(), input_gradients_only():
        _ = 1 / 0
    assert are_parameters_wanted()
    with input_gradients_only():
        with input_gradients_only():
            assert not are_parameters_wanted()
        assert not are_parameters_wanted()
    assert are_parameters_wanted()
