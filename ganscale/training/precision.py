"""Which arithmetic the forwards use, and the scaler that goes with it.

There is one kind of GradScaler whatever the precision: under fp16 its scale moves, under fp32 and
bf16 it stays at 1, where scaling is exact and free. So a non-finite gradient skips a network's
update by the same mechanism everywhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

# The customary 2**16 overflows in the first steps of a DCGAN; from here the scale grows by itself.
_INITIAL_FP16_SCALE = 2.0**12

# Of logits in inner gradients, whatever the scale of the loss: with one scale for both a penalty
# is lost to overflow from 2**16 on, with this it is fp32's to 3e-3 at any (benchmarks/RESULTS.md).
_INNER_FP16_SCALE = 2.0**10


@dataclass(frozen=True)
class Precision:
    """A precision on a device; parameters, statistics and optimizers are always fp32."""

    name: str
    device_type: str

    @classmethod
    def resolve(cls, name: str, device: torch.device) -> Precision:
        """ "auto" is fp16 on CUDA and fp32 on the CPU, where half precision is slower."""
        if name == "auto":
            name = "fp16" if device.type == "cuda" else "fp32"
        return cls(name, device.type)

    def autocast(self) -> AbstractContextManager[None]:
        """The context for forwards; under fp32 it changes nothing."""
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.name)
        context: AbstractContextManager[None] = torch.autocast(
            self.device_type, dtype=dtype or torch.bfloat16, enabled=dtype is not None
        )
        return context

    @property
    def inner_scale(self) -> float:
        """What logits are multiplied by when their gradient is part of a loss."""
        return _INNER_FP16_SCALE if self.name == "fp16" else 1.0

    def scaler(self) -> LossScaler:
        """A fresh scaler for one network."""
        return LossScaler(self.device_type, moves=self.name == "fp16")


class LossScaler:
    """GradScaler for one optimizer, with a fixed scale of 1 where scaling is not needed."""

    def __init__(self, device_type: str, *, moves: bool) -> None:
        self._moves = moves
        self._device_type = device_type
        self._scaler = self._fresh()

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of `loss`, (), times the scale; gradients stay scaled until `unscale`."""
        self._scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, noting whether all are finite."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step if all gradients are finite; then move the scale."""
        self._scaler.step(optimizer)
        if self._moves:
            self._scaler.update()
        else:
            # The scale stays, but the scaler has to be told that the step is over: it refuses to
            # unscale the same optimizer twice before that.
            self._scaler.update(1.0)

    def recover(self) -> None:
        """Forget a step that was begun and not ended."""
        state = self.state_dict()
        self._scaler = self._fresh()
        self.load_state_dict(state)

    def _fresh(self) -> torch.amp.GradScaler:
        initial = _INITIAL_FP16_SCALE if self._moves else 1.0
        return torch.amp.GradScaler(self._device_type, init_scale=initial)

    @property
    def scale(self) -> float:
        """The current loss scale; on CUDA this waits for the device."""
        return self._scaler.get_scale()

    def state_dict(self) -> dict[str, Any]:
        """The scale, its growth counter and whether the scale moves."""
        return {**self._scaler.state_dict(), "moves": self._moves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved scale, if both it and this one move.

        A run that goes on with another precision begins with that precision's own scale: fp16
        gradients underflow at the 1 of fp32 and bf16, and a fixed scale is 1.
        """
        # Checkpoints of older versions do not say whether their scale moves; a fixed one is 1.
        if self._moves and state.get("moves", state["scale"] != 1.0):
            self._scaler.load_state_dict(state)
