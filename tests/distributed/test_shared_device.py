"""Ranks that share a device: gloo exchanges everything, and steps are not captured.

The tests of gradients, batch statistics, skipped steps and resumption run there too: `-m gpu` in
`test_gradients`, `test_world_size`, `test_precision` and `tests/faults/test_kill_and_resume`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist

from ganscale.config import Config
from ganscale.errors import ConfigError
from ganscale.training import step_graphs
from ganscale.training.collectives import (
    broadcast_bytes,
    gather_objects,
    global_mean,
    kth_largest,
    sum_over_ranks,
    sum_over_ranks_with_gradient,
)
from ganscale.training.loop import train
from ganscale.training.step_graphs import choose_capture
from ganscale.world import World, is_device_shared, process_group
from tests.conftest import MakeConfig
from tests.support.devices import on_each_device
from tests.support.ranks import run_ranks
from tests.support.runs import final_digest


def _exchanged(world: World) -> dict[str, Any]:
    """The results of everything that ranks exchange, with tensors on the world's device."""
    device, rank = world.torch_device, world.rank
    values = torch.tensor([1.0, 10.0], device=device) * (rank + 1)
    table = torch.full((4,), -torch.inf, device=device)
    table[rank::2] = torch.tensor([3.0, 7.0], device=device) + rank
    leaf = values.clone().requires_grad_()
    # The sum over ranks of squared sums: each rank's gradient counts every rank's square.
    sum_over_ranks_with_gradient(leaf).square().sum().backward()
    assert leaf.grad is not None
    return {
        "kinds": {
            dtype: sum_over_ranks(torch.full((3,), rank + 1, dtype=dtype, device=device)).tolist()
            for dtype in (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32)
        },
        "sum": sum_over_ranks(values).tolist(),
        "untouched": values.tolist(),
        "gradient": leaf.grad.tolist(),
        "mean": float(global_mean(values, 2 / 4)),
        "largest": kth_largest(table, torch.tensor(2, device=device)).tolist(),
        "objects": gather_objects({"rank": rank}),
        "bytes": broadcast_bytes(b"from rank 0" if rank == 0 else None),
        "backend": dist.get_backend_config(),
    }


@on_each_device
def test_two_ranks_exchange_what_training_does(device: str) -> None:
    results = run_ranks(2, _exchanged, device=device)
    for found in results:
        for values in found["kinds"].values():
            assert values == [3, 3, 3]
        assert found["sum"] == [3, 30]
        # d/dx of 2 ranks' (x + y)^2 is 2 * 2 (x + y).
        assert found["gradient"] == [12, 120]
        assert found["mean"] == 33 / 4
        # 3, 4, 7 and 8 are the table's values.
        assert found["largest"] == [7]
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
        assert found["bytes"] == b"from rank 0"
        assert "cuda:gloo" in found["backend"]
    assert [found["untouched"] for found in results] == [[1, 10], [2, 20]]


def _train(world: World, *configs: Config) -> None:
    for config in configs:
        train(config, world)


@pytest.mark.slow  # test_kill_and_resume has it on the CPU
@on_each_device
def test_a_run_of_two_ranks_resumes_bit_for_bit(make_config: MakeConfig, device: str) -> None:
    settings: dict[str, Any] = {
        "launch__num_workers": 2,
        "model": {"name": "sngan", "base_channels": 4},
        "objective": {"name": "hinge", "top_k": 0.5},
        "augment": {"name": "ada", "target": 0.6},
        "penalty": {"r1": 0.1, "interval": 2, "lecam": 0.1},
    }
    whole = make_config(name="whole", training__total_kimg=0.16, **settings)
    half = make_config(name="parts", training__total_kimg=0.08, **settings)
    rest = make_config(name="parts", training__total_kimg=0.16, **settings)
    run_ranks(2, _train, whole, half, rest, device=device)
    assert [final_digest(config)[0] for config in (whole, rest)] == [160, 160]
    assert final_digest(rest) == final_digest(whole)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a"], False),
        (["a", "b"], False),
        (["a", "a"], True),
        (["a", "b", "c", "b"], True),
    ],
)
def test_ranks_tell_each_other_their_devices(names: list[str], expected: bool) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    for rank, name in enumerate(names):
        store.set(f"device/{rank}", name)
    for rank, name in enumerate(names):
        world = World(rank, rank, len(names), "cuda:0")
        assert is_device_shared(name, world, store) == expected


@pytest.fixture
def group() -> Iterator[None]:
    with process_group(World()):
        yield


@pytest.mark.usefixtures("group")
def test_steps_over_gloo_are_not_captured() -> None:
    device = torch.device("cuda:0")
    assert choose_capture("auto", device) is None
    assert choose_capture("off", device) is None
    with pytest.raises(ConfigError, match=r"cuda_graphs=on, but ranks share a GPU.*set training"):
        choose_capture("on", device)
    assert choose_capture("on", torch.device("cpu")) is None


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("mode", "captures"), [("auto", True), ("on", True), ("off", False)])
def test_steps_over_nccl_are_captured(
    mode: Any, captures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(step_graphs, "CudaCapture", lambda: lambda step: None)
    assert (choose_capture(mode, torch.device("cuda:0")) is not None) == captures
