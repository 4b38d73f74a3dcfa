"""GAN inversion: latents whose images match given ones, or a degraded observation of them.

For an observation y = A x + noise, each image's latent minimises

    mean((A G(z) - y)^2) + prior * mean(z^2)

by gradient descent from several starts (Lipton and Tripathi 2017, arXiv 1702.04782; Bora et al.
2017, arXiv 1703.03208): the latents of a fixed pool whose images come nearest, and the encoder's
where there is one (Zhu et al. 2020, arXiv 2004.00049). The start with the lowest loss wins.
Optionally a copy of the generator is then tuned to each image (Roich et al. 2021, arXiv
2106.05744).

Images are processed in groups of one size, so that no image's result depends on the others or on
the number of ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ganscale.generation.batched_optimizers import adam, lbfgs
from ganscale.generation.degradations import Degradation
from ganscale.generation.latents import seed_for
from ganscale.generation.sampler import SampleableGenerator

GROUP = 16
"""Images that are inverted at once; a smaller group is filled up by its last image."""
_ROWS = 64
"""Latents of the pool in each forward."""


@dataclass(frozen=True)
class InversionSettings:
    """The effort and the settings of an inversion; they are part of its protocol as they are
    named."""

    optimizer: Literal["adam", "lbfgs"] = "lbfgs"
    steps: int = 100
    """Steps of the optimizer from every start."""
    restarts: int = 4
    """Starts of each image, the encoder's among them."""
    lr: float = 0.1
    """Adam's initial learning rate; a latent's elements are of size 1."""
    pool: int = 512
    """The number of latents that starts are chosen from."""
    prior: float | None = None
    """Weight of mean(z^2) in the loss; None for the degradation's default."""
    tuning_steps: int = 0
    """Steps of Adam on a copy of the generator, for each image."""
    tuning_lr: float = 3e-4
    seed: int = 0
    """The seed of the latents that starts are chosen from."""

    def prior_for(self, degradation: Degradation) -> float:
        """The weight of the prior: `prior`, or the degradation's default where that is None."""
        return degradation.prior if self.prior is None else self.prior

    def num_steps(self, num_images: int) -> int:
        """The sum of all numbers that `invert` calls its progress with."""
        return -(-num_images // GROUP) * self.steps + num_images * self.tuning_steps


@dataclass(frozen=True)
class InversionResult:
    """The latents that reproduce images best, and the generator's images of them."""

    latents: Tensor
    """(n, z_dim)"""
    labels: Tensor
    """int64 (n,); zeros if the generator takes none."""
    images: Tensor
    """(n, C, H, W) in [-1, 1]."""
    misfits: Tensor
    """Mean squared difference from the observation, (n,)."""


def invert(
    generator: SampleableGenerator,
    degradation: Degradation,
    observed: Tensor,
    search: InversionSettings,
    *,
    encoder: nn.Module | None = None,
    labels: Tensor | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> InversionResult:
    """Find the latents of n images from what was observed of them, on the generator's device.

    Args:
        generator: in evaluation mode.
        degradation: what was done to the images.
        observed: (n, ...), what `degradation.observe` gave.
        search: the settings.
        encoder: takes images in [-1, 1] to (mean, log-variance); one start is its mean.
        labels: int64 (n,) where they are known. Otherwise each start keeps its own from the pool,
            and the best start decides.
        progress: called with the number of steps done, in all `search.num_steps(n)`.
    """
    # One pool for all images: its forwards are paid once, and every image has the same choice.
    pool = _Pool.of(generator, degradation, search)
    parts = []
    for start in range(0, len(observed), GROUP):
        part = observed[start : start + GROUP]
        known = None if labels is None else labels[start : start + GROUP]
        inverted = _invert_group(
            generator,
            degradation,
            _padded(part),
            search,
            starts=pool,
            encoder=encoder,
            labels=None if known is None else _padded(known),
            progress=progress,
        )
        count = len(part)
        if search.tuning_steps:
            inverted = _tune_generator(
                generator.model, degradation, part, inverted, search, progress
            )
        parts.append([field[:count] for field in vars(inverted).values()])
    return InversionResult(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


@torch.no_grad()
def encode(
    generator: SampleableGenerator,
    encoder: nn.Module,
    degradation: Degradation,
    observed: Tensor,
    *,
    labels: Tensor | None = None,
) -> InversionResult:
    """The encoder's latents of n observations, filled up to images, as `invert` returns them."""
    parts = []
    for start in range(0, len(observed), GROUP):
        part = observed[start : start + GROUP]
        padded = _padded(part)
        # A generator without classes ignores these; one with classes needs some label, and class 0
        # is as wrong as any.
        known = torch.zeros(GROUP, dtype=torch.int64, device=part.device)
        if labels is not None:
            known = _padded(labels[start : start + GROUP])
        z, _ = encoder(degradation.fill(padded))
        images = generator.model(z, known).float()
        fields = (z, known, images, degradation.misfit(images, padded))
        parts.append([field[: len(part)] for field in fields])
    return InversionResult(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Pool:
    """Latents that starts are chosen from, and what would be observed of their images."""

    latents: Tensor
    labels: Tensor
    observed: Tensor
    """(pool, ...)"""

    @classmethod
    @torch.no_grad()
    def of(
        cls, generator: SampleableGenerator, degradation: Degradation, search: InversionSettings
    ) -> _Pool:
        device = next(generator.model.parameters()).device
        random = torch.Generator().manual_seed(seed_for(search.seed, "pool"))
        size = -(-search.pool // _ROWS) * _ROWS
        # Drawn on the CPU, so that all devices have the same pool.
        z = torch.randn(size, generator.z_dim, generator=random)
        classes = max(generator.num_classes, 1)
        labels = torch.randint(classes, (size,), generator=random)
        z, labels = z.to(device), labels.to(device)
        groups = zip(z.split(_ROWS), labels.split(_ROWS), strict=True)
        images = [generator.model(*group) for group in groups]
        return cls(z, labels, degradation.operator(torch.cat(images).float()))

    def nearest(self, observed: Tensor, labels: Tensor | None, k: int) -> Tensor:
        """Rows of the k that come nearest to each of `observed`, best first, (n, k)."""
        # By differences: products would lose the digits of near matches, which decide the order.
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(observed.flatten(1), self.observed.flatten(1), compute_mode=mode)
        if labels is not None:
            distances[labels[:, None] != self.labels] = torch.inf
        return distances.topk(k, largest=False).indices


def _invert_group(
    generator: SampleableGenerator,
    degradation: Degradation,
    observed: Tensor,
    search: InversionSettings,
    *,
    starts: _Pool,
    encoder: nn.Module | None,
    labels: Tensor | None,
    progress: Callable[[int], None],
) -> InversionResult:
    """For a whole group: the best of each image's starts."""
    n, restarts = len(observed), search.restarts
    rows = starts.nearest(observed, labels, restarts)
    z = starts.latents[rows]
    chosen = starts.labels[rows] if labels is None else labels[:, None].expand(-1, restarts)
    if encoder is not None:
        with torch.no_grad():
            # In place of the worst of the pool's starts, so that an encoder costs no further start.
            z[:, -1] = encoder(degradation.fill(observed))[0]
    # All starts of all images are rows of one minimisation.
    wanted = observed.repeat_interleave(restarts, 0)
    chosen = chosen.reshape(-1)

    def loss_fn(points: Tensor) -> Tensor:
        misfits = degradation.misfit(generator.model(points, chosen).float(), wanted)
        return misfits + search.prior_for(degradation) * points.square().mean(1)

    start = z.reshape(n * restarts, -1)
    if search.optimizer == "adam":
        minimum = adam(loss_fn, start, steps=search.steps, lr=search.lr, progress=progress)
    else:
        minimum = lbfgs(loss_fn, start, steps=search.steps, progress=progress)
    best = minimum.losses.view(n, restarts).argmin(1) + restarts * torch.arange(n, device=z.device)
    latents, classes = minimum.points[best], chosen[best]
    with torch.no_grad():
        images = generator.model(latents, classes).float()
        return InversionResult(latents, classes, images, degradation.misfit(images, observed))


def _tune_generator(
    model: nn.Module,
    degradation: Degradation,
    observed: Tensor,
    inverted: InversionResult,
    search: InversionSettings,
    progress: Callable[[int], None],
) -> InversionResult:
    """Images of a copy of the generator for each, tuned to what was observed; latents stay."""
    images, misfits = inverted.images.clone(), inverted.misfits.clone()
    for row in range(len(observed)):
        # Images are tuned one by one: each needs a generator and moments of its own. The prior is
        # left out, since the latent no longer moves.
        own = copy.deepcopy(model).requires_grad_(True)
        optimizer = torch.optim.Adam(own.parameters(), lr=search.tuning_lr)
        place = slice(row, row + 1)
        z, label, wanted = inverted.latents[place], inverted.labels[place], observed[place]
        for _ in range(search.tuning_steps):
            loss = degradation.misfit(own(z, label).float(), wanted).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress(1)
        with torch.no_grad():
            images[place] = own(z, label).float()
            misfits[place] = degradation.misfit(images[place], wanted)
    return InversionResult(inverted.latents, inverted.labels, images, misfits)


def _padded(rows: Tensor) -> Tensor:
    """A whole group: the last row repeated."""
    return torch.cat([rows, rows[-1:].expand(GROUP - len(rows), *rows.shape[1:])])
