"""Latents as pure functions: of (seed, position) in training, of a sample's own seed afterwards.

No generator state is kept anywhere, so there is nothing to save, and any number of workers draws
what one would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

__all__ = ["StepRandomness", "seed_for", "seeded_labels", "seeded_latents"]


def seed_for(*key: int | str) -> int:
    """A 63-bit seed decided by `key`, the same on every platform."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


class _Rows(Protocol):
    def __getitem__(self, rows: Tensor) -> Self: ...

    def to(self, device: torch.device, non_blocking: bool = False) -> Self: ...


Rows = TypeVar("Rows", bound=_Rows)


class StepRandomness:
    """Random numbers of one step: what is drawn is for the global batch, of which a rank gets its.

    Args:
        seed: of the run.
        position: of the step's global batch.
        batch_size: of the global batch.
        slots: (n,) which of its places are this rank's.
        device: where the numbers are wanted; they are drawn on the CPU, alike everywhere.
    """

    def __init__(
        self, seed: int, position: int, batch_size: int, slots: Tensor, device: torch.device
    ) -> None:
        self._key = (seed, position)
        self.batch_size = batch_size
        self._slots = slots
        self._device = device

    def generator(self, purpose: str) -> torch.Generator:
        """The generator of one purpose, at its beginning."""
        return torch.Generator().manual_seed(seed_for(*self._key, purpose))

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """N(0, 1), (n, *shape)."""
        return self._mine(torch.randn(self.batch_size, *shape, generator=self.generator(purpose)))

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """In [0, 1), (n, *shape)."""
        return self._mine(torch.rand(self.batch_size, *shape, generator=self.generator(purpose)))

    def rows_of(self, draw: Callable[[int, torch.Generator], Rows], purpose: str) -> Rows:
        """This rank's rows of what `draw(batch_size, generator)` draws for the global batch."""
        rows = draw(self.batch_size, self.generator(purpose))
        return rows[self._slots].to(self._device, non_blocking=True)

    def table(self, values: Tensor, *, fill: float) -> Tensor:
        """This rank's values (n,) at their places of the global batch, (B,)."""
        table = values.new_full((self.batch_size,), fill)
        table[self._slots.to(values.device)] = values
        return table

    def _mine(self, values: Tensor) -> Tensor:
        return values[self._slots].to(self._device, non_blocking=True)


def seeded_latents(seeds: list[int], z_dim: int) -> Tensor:
    """One N(0, 1) latent for each seed, the same whatever else is in the list; (n, z_dim)."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed_for("sample", seed))
        rows.append(torch.randn(z_dim, generator=generator))
    return torch.stack(rows)


def seeded_labels(seeds: list[int], num_classes: int) -> Tensor:
    """One uniform label for each seed, the same whatever else is in the list; int64 (n,)."""
    return torch.tensor([seed_for("label", seed) % num_classes for seed in seeds])
