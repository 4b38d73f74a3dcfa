"""Latents as pure functions: of (seed, position) in training, of a sample's own seed afterwards.

No generator state is kept anywhere, so there is nothing to save, and any number of workers draws
what one would have drawn.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor


def seed_for(*key: SupportsIndex | str) -> int:
    """A 63-bit seed decided by `key`, the same on every platform."""
    # Numbers of numpy are printed with their type, and would give other seeds than Python's.
    key = tuple(part if isinstance(part, str) else operator.index(part) for part in key)
    # Not `hash`, which differs between processes, and not a sum of numbers, by which the keys (1,
    # 2) and (2, 1) would collide.
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


Draw = Callable[[int, torch.Generator], Tensor]
"""Draws the random numbers of one purpose for a whole batch: (batch_size, generator) to rows."""


def normal(*shape: int) -> Draw:
    """Draws N(0, 1), (batch_size, *shape)."""
    return lambda batch_size, generator: torch.randn(batch_size, *shape, generator=generator)


def uniform(*shape: int) -> Draw:
    """Draws from [0, 1), (batch_size, *shape)."""
    return lambda batch_size, generator: torch.rand(batch_size, *shape, generator=generator)


def draw_noise(
    draws: Mapping[str, Draw], *, seed: int, position: int, batch_size: int, slots: Tensor
) -> dict[str, Tensor]:
    """The random numbers of one step by purpose, on the CPU; each (n, ...).

    They are drawn for the global batch of `batch_size` that starts at `position`, and this rank
    gets the rows of its `slots` (n,). The purpose is part of the seed, so a purpose that is left
    out does not change the numbers of the others.
    """
    noise = {}
    for purpose, draw in draws.items():
        generator = torch.Generator().manual_seed(seed_for(seed, position, purpose))
        # The whole batch is drawn on every rank and most of it dropped: a rank's share then depends
        # on nothing but its slots, at any number of ranks.
        noise[purpose] = draw(batch_size, generator)[slots]
    return noise


def seeded_latents(seeds: Sequence[SupportsIndex], z_dim: int) -> Tensor:
    """One N(0, 1) latent for each seed, the same whatever else is in the list; (n, z_dim)."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed_for("sample", seed))
        rows.append(torch.randn(z_dim, generator=generator))
    return torch.stack(rows)


def seeded_labels(seeds: Sequence[SupportsIndex], num_classes: int) -> Tensor:
    """One uniform label for each seed, the same whatever else is in the list; int64 (n,)."""
    # The remainder's bias is num_classes / 2^63.
    return torch.tensor([seed_for("label", seed) % num_classes for seed in seeds])


def seeded_labels_by_count(seeds: list[int], class_counts: Sequence[int]) -> Tensor:
    """One label for each seed, each class as often as it has images; int64 (n,).

    A class without images is never drawn. With equal counts the labels are those of
    `seeded_labels`. At least one count must be above 0.
    """
    # A seed's number chooses one of all images. They are put in rounds that take one image of each
    # class that has any left, the most frequent class first. So equal counts give the labels 0, 1,
    # ..., num_classes - 1, 0, 1, ..., and with these the uniform label of the seed. From one count
    # that occurs to the next, all rounds have the same number of classes.
    counts = np.asarray(class_counts, dtype=np.int64)
    order = np.argsort(-counts, kind="stable")
    levels = np.unique(counts[counts > 0])
    sizes = len(counts) - np.searchsorted(np.sort(counts), levels)
    num_images = sizes * np.diff(levels, prepend=0)
    ends = np.cumsum(num_images)
    # In Python's integers, since a seed's number has 63 bits.
    places = np.array([seed_for("label", seed) % int(ends[-1]) for seed in seeds], dtype=np.int64)
    block = np.searchsorted(ends, places, side="right")
    return torch.from_numpy(order[(places - (ends - num_images)[block]) % sizes[block]])
