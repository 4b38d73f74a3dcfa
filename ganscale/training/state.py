"""Everything about a run that changes: the models, the averaged networks, the position.

What is random or ordered is not here: it follows from (seed, position).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ganscale.ema import Ema
from ganscale.tracking.stats import RunningMeans
from ganscale.training.steps import TrainingMethod

__all__ = ["TrainingState"]


class TrainingState:
    """The state of a run; `nimg` is the position, `step` counts global batches.

    `averaged` are the networks that snapshots hold, by name, as they learn; `emas` their averages
    by the name of their snapshots: "" is the one that samples are drawn from.
    """

    def __init__(
        self,
        method: TrainingMethod,
        averaged: nn.ModuleDict,
        emas: dict[str, Ema],
        device: torch.device,
    ) -> None:
        self.method = method
        self.averaged = averaged
        self.emas = emas
        self.means = RunningMeans(tuple(f"train/{name}" for name in method.statistics), device)
        self.nimg = 0
        self.step = 0

    @property
    def generator(self) -> nn.Module:
        """The averaged generator that samples are drawn from."""
        return self.networks("")["generator"]

    def networks(self, average: str) -> dict[str, nn.Module]:
        """The networks of one of the averages, by name."""
        model = self.emas[average].model
        assert isinstance(model, nn.ModuleDict)
        return dict(model.items())

    def state_dict(self) -> dict[str, Any]:
        """All of it, as nested dictionaries of tensors and numbers."""
        return {
            **{letter: model.state_dict() for letter, model in self.method.models.items()},
            "averages": {
                average: {name: m.state_dict() for name, m in self.networks(average).items()}
                for average in self.emas
            },
            "method": self.method.state_dict(),
            "nimg": self.nimg,
            "step": self.step,
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
