"""Everything about a run that changes: the two players, the averaged generator, the position.

What is random or ordered is not here: it follows from (seed, position).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ganscale.ema import Ema
from ganscale.tracking.stats import RunningMeans
from ganscale.training.feedback import Feedback
from ganscale.training.players import Player

__all__ = ["STATISTICS", "TrainingState"]

STATISTICS = (
    "train/loss_D",
    "train/loss_G",
    "train/real_logits",
    "train/fake_logits",
    "train/grad_norm_D",
    "train/grad_norm_G",
)


class TrainingState:
    """The state of a run; `nimg` is the position, `step` counts discriminator updates.

    `emas` are the averaged generators by the name of their snapshots: "" is the one that samples
    are drawn from.
    """

    def __init__(
        self,
        generator: Player,
        discriminator: Player,
        emas: dict[str, Ema],
        feedback: Feedback,
        penalties: Iterable[str],
    ) -> None:
        self.generator = generator
        self.discriminator = discriminator
        self.emas = emas
        self.feedback = feedback
        statistics = (*STATISTICS, *(f"train/penalty_{name}" for name in penalties))
        self.means = RunningMeans(statistics, generator.num_skips.device)
        self.nimg = 0
        self.step = 0

    @property
    def ema(self) -> Ema:
        """The averaged generator that samples are drawn from."""
        return self.emas[""]

    def state_dict(self) -> dict[str, Any]:
        """All of it, as nested dictionaries of tensors and numbers."""
        return {
            "G": self.generator.state_dict(),
            "D": self.discriminator.state_dict(),
            "G_ema": {name: ema.model.state_dict() for name, ema in self.emas.items()},
            "feedback": self.feedback.state_dict(),
            "nimg": self.nimg,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state in place."""
        self.generator.load_state_dict(state["G"])
        self.discriminator.load_state_dict(state["D"])
        for name, ema in self.emas.items():
            ema.model.load_state_dict(state["G_ema"][name])
        self.feedback.load_state_dict(state["feedback"])
        self.nimg = state["nimg"]
        self.step = state["step"]
