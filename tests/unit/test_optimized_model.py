"""Loss scaling and skipped steps of a model, in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ganscale.config import OptimizerConfig, Schedule
from ganscale.training.optimized_model import OptimizedModel
from ganscale.training.precision import Precision
from ganscale.training.step_inputs import Rates
from ganscale.world import World, process_group


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(World()):
        yield


@pytest.mark.parametrize("older_version", [False, True])
def test_only_a_scale_that_moves_is_taken_up_and_only_by_one_that_moves(
    older_version: bool,
) -> None:
    def scale(begun_in: str, resumed_in: str) -> float:
        moved = Precision("fp16", "cpu").scaler()
        begun, resumed = (Precision(name, "cpu").scaler() for name in (begun_in, resumed_in))
        begun.load_state_dict({**moved.state_dict(), "scale": 64.0})
        saved = begun.state_dict()
        if older_version:
            saved.pop("moves")
        resumed.load_state_dict(saved)
        return resumed.scale

    assert scale("fp32", "fp16") == scale("bf16", "fp16") == 2.0**12
    assert scale("fp16", "fp16") == 64.0
    assert scale("fp16", "fp32") == scale("fp32", "bf16") == 1.0


def test_a_moving_scale_of_1_is_taken_up() -> None:
    fp16 = Precision("fp16", "cpu")
    first, second = fp16.scaler(), fp16.scaler()
    first.load_state_dict({**first.state_dict(), "scale": 1.0})
    second.load_state_dict(first.state_dict())
    assert second.scale == 1.0


def _model(precision: str) -> OptimizedModel:
    torch.manual_seed(0)
    policy = Precision.resolve(precision, torch.device("cpu"))
    return OptimizedModel(
        nn.Linear(3, 1), OptimizerConfig(lr=Schedule.constant(0.1)), policy, World()
    )


def _update(model: OptimizedModel, factor: float) -> torch.Tensor:
    model.backward(model.ddp_module(torch.ones(2, 3)).sum() * factor)
    lr, beta2 = (torch.tensor(value, dtype=torch.float64) for value in (0.1, 0.999))
    return model.step(Rates(lr, beta2))


def test_step_is_adams_whatever_the_scale() -> None:
    for precision in ("fp32", "bf16", "fp16"):
        model = _model(precision)
        before = model.module.weight.detach().clone()  # type: ignore[operator]
        norm = _update(model, 1.0)
        # The gradient of each weight is 2, of the bias 2; Adam's first step is lr * sign.
        torch.testing.assert_close(norm, torch.tensor(4.0))
        torch.testing.assert_close(model.module.weight, before - 0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_non_finite_gradient_skips_counts_and_recovers(precision: str, factor: float) -> None:
    model = _model(precision)
    _update(model, 1.0)
    weights = {k: v.clone() for k, v in model.module.state_dict().items()}
    scale = model.scaler.scale
    norm = _update(model, factor)
    assert not torch.isfinite(norm)
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, weights[name])
    assert int(model.num_skips) == 1
    assert model.scaler.scale == (scale / 2 if precision == "fp16" else 1.0)
    _update(model, 1.0)
    assert int(model.num_skips) == 1
    assert not torch.equal(model.module.weight, weights["weight"])  # type: ignore[arg-type]
    steps = [int(s["step"]) for s in model.optimizer.state.values()]
    assert steps == [2, 2]


def test_state_round_trip_continues_identically() -> None:
    one, other = _model("fp16"), _model("fp16")
    _update(one, 1.0)
    _update(one, float("inf"))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for model in (one, other):
        _update(model, 0.5)
    assert torch.equal(one.module.weight, other.module.weight)  # type: ignore[arg-type]
    assert one.scaler.state_dict() == other.scaler.state_dict()
    assert int(other.num_skips) == 1
