"""Paths between latents and between classes, and the images along them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ganscale.errors import ConfigError
from ganscale.generation.latent_sampler import LatentSampler

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """(1 - t) a + t b for vectors (..., d) and t in [0, 1], (...) or a scalar."""
    t = t.to(a)[..., None]
    return (1 - t) * a + t * b


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation from a to b, with linearly changing length; shapes as for `lerp`.

    White (2016, arXiv 1609.04468) after Shoemake (1985): a straight line passes nearer to 0 than
    samples of a Gaussian ever are. The ends are exact. Between opposite vectors, where no arc is
    shortest, the path leads over the axis that is most nearly perpendicular to them; from or to 0
    it is straight.
    """
    t = t.to(a)[..., None]
    length_a, length_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    from_, to = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    # acos of the dot product loses half the digits near 0 and pi; this form does not.
    difference, total = (from_ - to).norm(dim=-1), (from_ + to).norm(dim=-1)
    angle = 2 * torch.atan2(difference, total)[..., None]
    direction = torch.cos(t * angle) * from_ + torch.sin(t * angle) * _perpendicular(from_, to)
    along = ((1 - t) * length_a + t * length_b) * direction
    # A vector of length 0 has no direction to turn from.
    straight = (length_a == 0) | (length_b == 0)
    along = torch.where(straight, (1 - t) * a + t * b, along)
    # Rounding would leave the ends a little off, and a seed's own image must be on its path.
    return torch.where(t == 0, a, torch.where(t == 1, b, along))


def path(points: Tensor, frames: int, *, mix: Mix, loop: bool = False) -> Tensor:
    """The points (n, d) with those between them: `frames` for each step, then the last point.

    Returns (frames (n - 1) + 1, d), or with `loop`, which also goes back to the first point and
    ends just before it, (frames n, d). Raises `ConfigError` without two points and one frame.
    """
    if len(points) < 2 or frames < 1:
        raise ConfigError(f"a path needs 2 points and 1 frame, got {len(points)} and {frames}")
    start, end = (points, points.roll(-1, 0)) if loop else (points[:-1], points[1:])
    t = torch.arange(frames, dtype=points.dtype) / frames
    whole = mix(start[:, None], end[:, None], t.expand(len(start), -1)).flatten(0, 1)
    return whole if loop else torch.cat([whole, points[-1:]])


def frames_between(
    sampler: LatentSampler,
    seeds: list[int],
    frames: int,
    *,
    mix: Mix = slerp,
    label: int | None = None,
    loop: bool = False,
) -> Tensor:
    """Images along the path through the seeds' latents, uint8 (frames, C, H, W).

    Where seeds have different classes, these are mixed linearly on the way.
    """
    z = path(sampler.latents(seeds), frames, mix=mix, loop=loop)
    classes = sampler.classes(seeds, label)
    if classes is not None:
        classes = path(classes, frames, mix=lerp, loop=loop)
    return sampler.draw(z, classes)


def class_frames(
    sampler: LatentSampler,
    seeds: list[int],
    labels: list[int],
    frames: int,
    *,
    loop: bool = False,
) -> Tensor:
    """Each seed's image on its way through classes, uint8 (seeds, frames, C, H, W).

    Classes are mixed linearly where the generator embeds them; the latents stay as they are.
    Raises `ConfigError` if it has no classes, or not these.
    """
    if not sampler.num_classes:
        raise ConfigError("this generator has no classes to interpolate between")
    known = [sampler.classes([0], label) for label in labels]
    mixed = path(torch.cat([c for c in known if c is not None]), frames, mix=lerp, loop=loop)
    z = sampler.latents(seeds).repeat_interleave(len(mixed), 0)
    images = sampler.draw(z, mixed.repeat(len(seeds), 1))
    grid: Tensor = images.unflatten(0, (len(seeds), len(mixed)))
    return grid


def _perpendicular(a: Tensor, b: Tensor) -> Tensor:
    """Unit vectors perpendicular to unit vectors a, in the plane of a and b if these span one."""
    perpendicular = b - (a * b).sum(-1, keepdim=True) * a
    axis = F.one_hot(a.abs().argmin(-1), a.shape[-1]).to(a)
    other = axis - (a * axis).sum(-1, keepdim=True) * a
    # Up to rounding a and b span no plane: any perpendicular vector will do, but always the same.
    is_none = perpendicular.norm(dim=-1, keepdim=True) < 8 * torch.finfo(a.dtype).eps
    return F.normalize(torch.where(is_none, other, perpendicular), dim=-1)
