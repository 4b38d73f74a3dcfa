"""Latents as pure functions: of (seed, position) in training, of a sample's own seed afterwards.

No generator state is kept anywhere, so there is nothing to save, and any number of workers draws
what one would have drawn.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["seed_for", "seeded_latents", "step_latents"]


def seed_for(*key: int | str) -> int:
    """A 63-bit seed decided by `key`, the same on every platform."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def step_latents(
    seed: int, position: int, purpose: str, batch_size: int, z_dim: int, slots: Tensor
) -> Tensor:
    """N(0, 1) latents for a global batch, of which this rank gets its `slots`; (n, z_dim)."""
    generator = torch.Generator().manual_seed(seed_for(seed, position, purpose))
    return torch.randn(batch_size, z_dim, generator=generator)[slots]


def seeded_latents(seeds: list[int], z_dim: int) -> Tensor:
    """One N(0, 1) latent for each seed, the same whatever else is in the list; (n, z_dim)."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed_for("sample", seed))
        rows.append(torch.randn(z_dim, generator=generator))
    return torch.stack(rows)
