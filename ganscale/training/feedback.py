"""What the discriminator's logits feed back into the game: ADA's strength, LeCam's anchors.

Both are running figures over the global batch, the same on all ranks, and part of a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ganscale.config import AugmentConfig
from ganscale.training.adversarial_step import PhaseResult
from ganscale.training.distribute import sum_over_ranks

__all__ = ["Feedback"]

_STEPS_PER_ADAPTATION = 4
_ANCHOR_DECAY = 0.99


class Feedback:
    """Follows the logits of the discriminator's phases.

    `augment_p` moves by a constant step, every four phases, so that the mean sign of the logits at
    real images comes to the target (Karras et al. 2020, arXiv 2006.06676, section 3.1); without a
    target it stays where it is. `anchors` are running means of real and fake logits with a decay
    of 0.99 (Tseng et al. 2021, arXiv 2104.03310, equation 5).
    """

    def __init__(self, augment: AugmentConfig, world_size: int, device: torch.device) -> None:
        self.target = augment.target
        self.adapt_nimg = 1000 * augment.adapt_kimg
        self.world_size = world_size
        self.augment_p = torch.tensor(augment.p.at(0), device=device)
        self.anchors = torch.zeros(2, device=device)
        self._signs = torch.zeros((), device=device)

    def update(self, seen: PhaseResult, *, step: int, batch_size: int) -> None:
        """Take in the phase of discriminator update number `step` (0, 1, ...)."""
        mine = torch.stack([seen.real_logits, seen.fake_logits, seen.real_signs])
        means = sum_over_ranks(mine) / self.world_size
        # A step that was skipped for its non-finite gradients leaves no trace here either.
        means = torch.where(means.isfinite().all(), means, self._unmoved())
        self.anchors.lerp_(means[:2], 1 - _ANCHOR_DECAY)
        self._signs += means[2]
        if self.target is not None and step % _STEPS_PER_ADAPTATION == _STEPS_PER_ADAPTATION - 1:
            excess = self._signs / _STEPS_PER_ADAPTATION - self.target
            moved = excess.sign() * (batch_size * _STEPS_PER_ADAPTATION / self.adapt_nimg)
            self.augment_p.add_(moved).clamp_(0, 1)
            self._signs.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """All three figures."""
        return {"augment_p": self.augment_p, "anchors": self.anchors, "signs": self._signs}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up saved figures in place."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def _unmoved(self) -> Tensor:
        return torch.cat([self.anchors, self.anchors.new_zeros(1)])
