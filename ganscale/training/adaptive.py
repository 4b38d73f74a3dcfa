"""State that follows the discriminator's logits: ADA's probability and LeCam's anchors.

Both live on the device, are the same on all ranks, and are part of a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ganscale.config import AugmentConfig

_STEPS_PER_ADAPTATION = 4
_ANCHOR_DECAY = 0.99


def ada_p_step(config: AugmentConfig, step: int, batch_size: int) -> float:
    """How far ADA's p may move in update number `step` (0, 1, ...) of a global batch; often 0."""
    # Decided here, on the host, by the position: on the device p always moves, by 0 most of the
    # time, so that one graph does for all steps.
    if step % _STEPS_PER_ADAPTATION != _STEPS_PER_ADAPTATION - 1:
        return 0.0
    # If each of its moves goes up, p comes from 0 to 1 in `adapt_kimg`.
    return batch_size * _STEPS_PER_ADAPTATION / (1000 * config.adapt_kimg)


class AdaController:
    """The adaptive probability of augmentations (Karras et al. 2020, arXiv 2006.06676, 3.1).

    Every four updates of the discriminator `p` moves by a constant amount, so that the mean sign of
    the logits at real images comes to the target.
    """

    def __init__(self, config: AugmentConfig, device: torch.device) -> None:
        assert config.target is not None
        self.target = config.target
        self.p = torch.tensor(config.p.at(0), device=device)
        self._signs = torch.zeros((), device=device)

    def update(self, mean_sign: Tensor, p_step: Tensor) -> None:
        """Take in the mean sign of the logits at real images, (), and move p by `p_step`, ()."""
        # r_t of the paper's equation 1, E[sign(D(x))], over four minibatches: near 1 the
        # discriminator has overfitted, and more augmentation helps.
        self._signs += mean_sign
        excess = self._signs / _STEPS_PER_ADAPTATION - self.target
        self.p.add_(excess.sign() * p_step).clamp_(0, 1)
        self._signs.mul_(p_step == 0)  # a new sum begins where p has moved

    def state_dict(self) -> dict[str, Tensor]:
        """The probability, and the sum of signs since it last moved."""
        return {"p": self.p, "signs": self._signs}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a saved state in place."""
        # In place, so that a step captured as a graph reads what was loaded.
        self.p.copy_(state["p"])
        self._signs.copy_(state["signs"])


class LecamAnchors:
    """Running means of real and fake logits, `values` (2,), with a decay of 0.99.

    Tseng et al. (2021, arXiv 2104.03310), equation 5.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(2, device=device)

    def update(self, mean_logits: Tensor) -> None:
        """Take in the global means of real and fake logits, (2,)."""
        self.values.lerp_(mean_logits, 1 - _ANCHOR_DECAY)

    def state_dict(self) -> dict[str, Tensor]:
        """The two means."""
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a saved state in place."""
        self.values.copy_(state["values"])
