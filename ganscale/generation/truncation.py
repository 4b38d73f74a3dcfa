"""Truncation: less variety for more typical images.

Where there are styles w they are pulled towards their mean (Karras et al. 2019, arXiv 1812.04948,
appendix B). Elsewhere elements of z are drawn from a truncated normal (Brock et al. 2019, arXiv
1809.11096, section 3.1), by drawing again those that are too large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ganscale.errors import ConfigError
from ganscale.generation.latents import seed_for

_SMALLEST = 0.05
"""Below it nearly every draw is rejected, and the images are nearly one."""


def truncated_styles(w: Tensor, mean: Tensor, psi: float) -> Tensor:
    """mean + psi (w - mean), which is the mean at psi = 0 and w itself at 1."""
    return torch.lerp(mean.expand_as(w), w, psi)


def truncated_latents(seeds: list[int], z_dim: int, *, threshold: float) -> Tensor:
    """One latent for each seed, (n, z_dim), no element of which is larger than `threshold`.

    Elements that are small enough are those of `seeded_latents`, so images stay near theirs.
    Raises `ConfigError` for a threshold below 0.05.
    """
    if not threshold >= _SMALLEST:
        raise ConfigError(f"truncation_psi={threshold}: expected at least {_SMALLEST} without w")
    rows = []
    for seed in seeds:
        # The seed of `seeded_latents`, whose first draw is repeated here.
        generator = torch.Generator().manual_seed(seed_for("sample", seed))
        z = torch.randn(z_dim, generator=generator)
        # Rejected elements are drawn again from the same stream, which gives a truncated normal;
        # clamping would pile them up at the threshold.
        while bool((large := z.abs() > threshold).any()):
            z = torch.where(large, torch.randn(z_dim, generator=generator), z)
        rows.append(z)
    return torch.stack(rows)
