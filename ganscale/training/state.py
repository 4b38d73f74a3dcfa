"""Everything about a run that changes: the models, the averaged networks, the position.

What is random or ordered is not here: it follows from (seed, position).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from torch import nn

from ganscale.ema import Ema
from ganscale.errors import ConfigError
from ganscale.tracking.stats import RunningMeans
from ganscale.training.steps import TrainingMethod
from ganscale.world import World


class TrainingState:
    """The state of a run, which the loop advances and callbacks look at.

    `nimg` is the position in real images, `step` counts global batches. `averaged` are the networks
    that snapshots hold, by name, as they learn; `emas` their averages by the name of their
    snapshots: "" is the one that samples are drawn from.
    """

    def __init__(
        self, method: TrainingMethod, averaged: nn.ModuleDict, emas: dict[str, Ema], world: World
    ) -> None:
        self.method = method
        self.averaged = averaged
        self.emas = emas
        self.world = world
        names = tuple(f"train/{name}" for name in method.statistics)
        # All names from the start, also those of lazy penalties: the sums are one tensor on the
        # device.
        self.means = RunningMeans(names, world.torch_device)
        self.nimg = 0
        self.step = 0
        self.previous_nimg = 0
        """The position before the last step."""
        self.done = False
        """Whether this is the end of the run, where every callback is run."""
        self.checkpoint_requested = False
        """Whether a checkpoint is due for other reasons than the position: the clock, a stop."""
        self.stop_requested = False
        """Set by a callback, on all ranks at the same position, to end training here with a
        checkpoint."""
        self.next_row: dict[str, float] = {}
        """Metrics that go into the next row, the same on all ranks. Each is a number, or a tensor
        or array of one number."""
        self.latest_metrics: dict[str, float] = {}
        """What was measured last, by which the best checkpoints are chosen."""
        self.skipped_samples: list[str] = []
        """Damaged samples of this rank since the last row."""
        self.excluded_seconds = 0.0
        """Time since the last row that is not counted as training."""

    @property
    def generator(self) -> nn.Module:
        """The averaged generator that samples are drawn from."""
        return self.networks("")["generator"]

    def networks(self, average: str) -> dict[str, nn.Module]:
        """The networks of one of the averages, by name."""
        model = self.emas[average].model
        assert isinstance(model, nn.ModuleDict)
        return dict(model.items())

    def advance(self, batch_size: int) -> None:
        """A step on a global batch has been taken."""
        self.previous_nimg = self.nimg
        self.nimg += batch_size
        self.step += 1

    def row_values(self) -> dict[str, float]:
        """`next_row` as numbers. Raises `ConfigError`, on all ranks, that names what is none."""
        values = {}
        for name, value in self.next_row.items():
            try:
                values[name] = float(value)
            except (TypeError, ValueError, RuntimeError):
                raise ConfigError(
                    f"a callback has put something of type {type(value).__name__} into "
                    f"state.next_row[{name!r}]: a row takes numbers, or tensors of one number"
                ) from None
        return values

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Leave the time of the block out of the images per second."""
        began = perf_counter()
        try:
            yield
        finally:
            self.excluded_seconds += perf_counter() - began

    def state_dict(self) -> dict[str, Any]:
        """What all ranks have alike, as nested dictionaries of tensors and numbers."""
        return {
            **{letter: model.state_dict() for letter, model in self.method.models.items()},
            "averages": {
                average: {name: m.state_dict() for name, m in self.networks(average).items()}
                for average in self.emas
            },
            "method": self.method.state_dict(),
            "nimg": self.nimg,
            "step": self.step,
            "done": self.done,
            "next_row": self.row_values(),
            "latest_metrics": dict(self.latest_metrics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state in place."""
        for letter, model in self.method.models.items():
            model.load_state_dict(state[letter])
        for average in self.emas:
            for name, network in self.networks(average).items():
                network.load_state_dict(state["averages"][average][name])
        self.method.load_state_dict(state["method"])
        self.nimg = state["nimg"]
        self.step = state["step"]
        # Checkpoints of older versions do not say it; nothing is done a second time then.
        self.done = state.get("done", True)
        self.next_row = dict(state["next_row"])
        self.latest_metrics = dict(state["latest_metrics"])

    def rank_state_dict(self) -> dict[str, Any]:
        """What each rank has of its own: what it has not logged yet."""
        return {"means": self.means.state_dict(), "skipped": list(self.skipped_samples)}

    def load_rank_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Load what all ranks had, which another number of ranks shares."""
        world = self.world
        self.means.load_state_dict(
            [state["means"] for state in states], world.rank, world.world_size
        )
        # Nobody can say who read them in the new world; rank 0 reports them once.
        if world.is_main:
            self.skipped_samples = [text for state in states for text in state["skipped"]]
