"""What a training method is: the networks that learn, and what one step does to them.

The loop knows nothing else of it. So a GAN, a variational autoencoder and what lies between are
fed, averaged, checkpointed, guarded, rolled back and launched by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ganscale.config import Config
from ganscale.generation.snapshot import OTHERS
from ganscale.training.players import Player
from ganscale.training.precision import Precision
from ganscale.training.share import Moment, Share
from ganscale.training.watchdog import Phase
from ganscale.world import World

__all__ = ["AVERAGED", "Mark", "Method", "MethodClass"]

AVERAGED = ("generator", *OTHERS)
"""Networks that are averaged and, with that, part of snapshots."""

Mark = Callable[[Phase], None]
"""Tells the watchdog which phase a step is in."""


class Method(Protocol):
    """A way to train a generator. Everything random in it follows from the share and the moment."""

    @property
    def players(self) -> Mapping[str, Player]:
        """Who learns, by the letter of their statistics and in checkpoints."""
        ...

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of all that `step` may return."""
        ...

    def step(self, share: Share, moment: Moment, mark: Mark) -> dict[str, Tensor]:
        """Update the players on a share of a global batch.

        Returns statistics, each (): averaged over ranks they are those of the global batch.
        """
        ...

    def figures(self, nimg: int) -> dict[str, float]:
        """What a row tells besides the statistics, the same on all ranks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What changes besides the players."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state in place."""
        ...


class MethodClass(Protocol):
    """How a method is made."""

    @staticmethod
    def networks(config: Config) -> dict[str, nn.Module]:
        """Fresh networks by name, on the CPU; torch's global generator decides their weights.

        Raises `ConfigError` if one that is to be loaded does not fit the configuration.
        """
        ...

    def __call__(
        self, config: Config, networks: Mapping[str, nn.Module], precision: Precision, world: World
    ) -> Method:
        """The method with these networks, which it moves to the device."""
        ...
