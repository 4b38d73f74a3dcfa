"""Steps that are replayed compute what steps that are launched do.

On the CPU a graph is stood in for by the step itself, run again on the buffers that it was captured
with: what does not come through those would be missed there as well. With `-m gpu` CUDA's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ganscale.config import Config
from ganscale.training.build import load_shards
from ganscale.training.determinism import use_deterministic_kernels
from ganscale.training.loop import Trainer
from ganscale.training.step_graphs import Capture, StepRunner, own_stream
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.steps import next_inputs

NUM_STEPS = 20

CASES: dict[str, dict[str, Any]] = {
    "dcgan": {},
    "two discriminator steps, lazy R1": {
        "model__name": "sngan",
        "penalty__r1": 0.1,
        "penalty__interval": 3,
        "training__discriminator_steps": 2,
    },
    "r3gan, schedules, ADA, LeCam": {
        "model": {"name": "r3gan", "base_channels": 16, "blocks_per_stage": 1, "num_classes": 10},
        "objective__name": "relativistic",
        "penalty": {"r1": {"start": 1, "end": 0.1, "kimg": 1, "shape": "cosine"}, "lecam": 0.1},
        "augment": {"name": "ada", "target": 0.6},
        "optimizer__beta2": {"start": 0.9, "end": 0.99, "kimg": 1, "shape": "cosine"},
        "optimizer__lr": {"start": 1e-3, "end": 1e-4, "kimg": 1, "shape": "linear"},
    },
    "micro-batches": {
        "model": {"name": "r3gan", "base_channels": 16, "blocks_per_stage": 1},
        "penalty__r1": 0.1,
        "training__micro_batch_size": 6,
    },
    "vae-gan": {"method__name": "vae-gan"},
    "semi-supervised": {
        "model__num_classes": 10,
        "method": {"name": "semi-supervised", "labels": 20},
    },
}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(World()):
        yield


class Again:
    """Stands in for a graph: runs the step anew, on the tensors that it was captured with."""

    num_replays = 0

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step

    def replay(self) -> None:
        Again.num_replays += 1
        self.step()


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in nested dictionaries, by their paths."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f"{name}/{key}")


def trained(config: Config, capture: Capture | None, **options: Any) -> dict[str, Any]:
    """The state after some steps, and the means of the row that is due."""
    trainer = Trainer(config, World(), load_shards(config))
    try:
        trainer.steps = StepRunner(
            trainer._update,
            torch.device("cpu"),
            enter=lambda phase: None,
            capture=capture,
            recover=trainer.state.method.recover,
            **options,
        )
        for _ in range(NUM_STEPS):
            trainer.step(next_inputs(trainer))
        return {**trainer.state.state_dict(), "means": trainer.state.means.state_dict()}
    finally:
        trainer.close()


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = dict(tensors(one)), dict(tensors(other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert one["means"] == other["means"]


_ALWAYS = ("dcgan", "r3gan, schedules, ADA, LeCam")
"""Without randomness and with all of it; the other cases are marked as slow."""


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in _ALWAYS else pytest.mark.slow) for c in CASES]
)
def test_replayed_steps_have_the_bits_of_launched_ones(
    make_config: MakeConfig, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**CASES[case])
    monkeypatch.setattr(Again, "num_replays", 0)
    launched = trained(config, None)
    assert_equal(launched, trained(config, Again))
    assert Again.num_replays >= 6


def test_a_graph_reads_its_inputs_from_the_buffer_it_was_captured_with(
    make_config: MakeConfig,
) -> None:
    """An update that keeps the first inputs it was given would pass for nothing else."""
    config = make_config()
    trainer = Trainer(config, World(), load_shards(config))
    seen = []

    def update(packed: Any, variant: Any, enter: Any) -> None:
        seen.append((packed.buffer.data_ptr(), packed.buffer.clone()))

    runner = StepRunner(update, torch.device("cpu"), enter=lambda phase: None, capture=Again)
    for _ in range(NUM_STEPS):
        host = next_inputs(trainer)
        runner.run(host)
        assert torch.equal(seen[-1][1], host.packed.buffer)
        trainer.state.advance(config.training.batch_size)
    assert len({pointer for pointer, _ in seen[12:]}) == 1
    trainer.close()


def test_each_form_of_a_step_has_its_graph(make_config: MakeConfig) -> None:
    config = make_config(
        penalty__r1=0.1, penalty__interval=2, training__discriminator_steps=2, model__name="sngan"
    )
    graphs: list[Again] = []

    def capture(step: Callable[[], None]) -> Again:
        graphs.append(Again(step))
        return graphs[-1]

    trained(config, capture)
    assert len(graphs) == 2  # lazy steps are those in which the generator has no turn


@pytest.mark.parametrize(
    ("must_capture", "micro_batch_size"),
    [(False, None), pytest.param(False, 6, marks=pytest.mark.slow), (True, None)],
)
def test_a_step_that_cannot_be_captured_leaves_no_trace(
    make_config: MakeConfig, must_capture: bool, micro_batch_size: int | None
) -> None:
    """It fails in the middle of a backward, as one that is out of memory does."""
    config = make_config(
        model={"name": "r3gan", "base_channels": 16, "blocks_per_stage": 1},
        training__micro_batch_size=micro_batch_size,
    )
    tried = []

    def capture(step: Callable[[], None]) -> Again:
        tried.append(step)
        runner = step.__closure__[-1].cell_contents  # type: ignore[index]
        weight = next(iter(runner._update.__self__.state.method.models["D"].module.parameters()))

        def fail(gradient: torch.Tensor) -> None:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nand so on")

        handle = weight.register_hook(fail)
        try:
            step()
        finally:
            handle.remove()
        return Again(step)

    if must_capture:
        with pytest.raises(RuntimeError, match="out of memory"):
            trained(config, capture, must_capture=True)
        return
    with pytest.warns(UserWarning, match=r"could not be captured .*: CUDA out of memory.*GiB \("):
        state = trained(config, capture)
    assert len(tried) == 1
    assert_equal(state, trained(config, None))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("case", CASES)
def test_cuda_graphs_have_the_bits_of_launched_steps(
    make_config: MakeConfig, case: str, compiled: str
) -> None:
    world = World(device="cuda:0")
    use_deterministic_kernels(world.torch_device)
    states = []
    for mode in ("off", "on"):
        modes = {"training__cuda_graphs": mode, "training__compile": compiled}
        config = make_config(**CASES[case], **modes)
        with process_group(world), own_stream(world.torch_device):
            trainer = Trainer(config, world, load_shards(config))
            for _ in range(200):
                trainer.step(next_inputs(trainer))
            state = trainer.state
            states.append({**state.state_dict(), "means": state.means.state_dict()})
            assert bool(trainer.steps._graphs) == (mode == "on")
            trainer.close()
    assert_equal(*states)
