"""Degradations of images that are to be reconstructed: a linear operator, and noise.

    y = A x + s n,  n ~ N(0, 1)

`TASKS` names the operators. Each also defines what a method must beat: a trivial reconstruction,
which fills the observation up to an image without having learnt anything. An inversion
differentiates through the operator itself, so autograd applies its adjoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ganscale.errors import ConfigError
from ganscale.generation.latents import seed_for

TASKS = ("identity", "inpaint", "superres", "denoise", "deblur", "colourise")

_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""
_HALF_RANGE = 127.5
"""Steps of a pixel to 1 on the scale of [-1, 1]."""
_PRIOR = 0.01
"""For tasks whose observation leaves the image open: without it improbable latents win, which fit
the observation a little better and are wrong elsewhere. Chosen on training images; deblur and
colourise have it unmeasured (benchmarks/RECONSTRUCTION.md)."""
_NOISE = 25.0
"""The default standard deviation of denoise, on the scale of 0 to 255."""


@dataclass(frozen=True, eq=False)
class Degradation:
    """A degradation of images (n, C, H, W) in [-1, 1]."""

    name: str
    """The task, with its settings: "superres x4"."""
    operator: Callable[[Tensor], Tensor]
    """A: images to what is observed of them, (n, ...)."""
    fill: Callable[[Tensor], Tensor]
    """Fills observations up to images, which encoders take and pictures show."""
    noise: float = 0.0
    """s, on the scale of [-1, 1]."""
    known: Tensor | None = None
    """Pixels that need no reconstruction, bool (H, W)."""
    trivial: Callable[[Tensor], Tensor] | None = None
    """The trivial reconstruction, where it is not `fill`."""
    prior: float = 0.0
    """The default weight of mean(z^2) in an inversion's loss."""

    def baseline(self, observed: Tensor) -> Tensor:
        """The trivial reconstruction, (n, C, H, W)."""
        return (self.trivial or self.fill)(observed)

    def observe(self, images: Tensor, numbers: list[int], *, seed: int = 0) -> Tensor:
        """The observation y; its noise depends on an image's number and the seed alone."""
        observed = self.operator(images)
        if not self.noise:
            return observed
        shape = observed.shape[1:]
        rows = []
        # A generator for each image, so that its noise depends neither on the batch nor on the
        # ranks.
        for number in numbers:
            generator = torch.Generator().manual_seed(seed_for(seed, "observe", number))
            rows.append(torch.randn(shape, generator=generator))
        return observed + self.noise * torch.stack(rows).to(observed)

    def misfit(self, images: Tensor, observed: Tensor) -> Tensor:
        """Mean squared difference of each image's A x from what was observed, (n,)."""
        return (self.operator(images) - observed).square().flatten(1).mean(1)

    def completed(self, images: Tensor, observed: Tensor) -> Tensor:
        """Reconstructions with the pixels that are known put back."""
        if self.known is None:
            return images
        return torch.where(self.known.to(images.device), self.fill(observed), images)


def identity() -> Degradation:
    """No degradation. The trivial reconstruction is each image's mean colour."""

    def mean_colour(observed: Tensor) -> Tensor:
        return observed.mean((2, 3), keepdim=True).expand_as(observed)

    return Degradation("identity", lambda images: images, lambda seen: seen, trivial=mean_colour)


def inpaint(missing: Tensor, *, noise: float = 0.0) -> Degradation:
    """Pixels where `missing` (H, W) is true are removed. The trivial reconstruction fills them with
    the mean of the others.

    Raises `ConfigError` unless some are missing and some are not.
    """
    seen = ~missing
    if not missing.any() or not seen.any():
        raise ConfigError("a mask must leave some pixels and remove some")

    def operator(images: Tensor) -> Tensor:
        return images[:, :, seen.to(images.device)]

    def fill(observed: Tensor) -> Tensor:
        where = seen.to(observed.device)
        images = observed.mean(2)[:, :, None, None].repeat(1, 1, *seen.shape)
        images[:, :, where] = observed
        return images

    # Noisy pixels are not known, so they are reconstructed like the missing ones.
    known = None if noise else seen
    return Degradation("inpaint", operator, fill, noise=noise, known=known, prior=_PRIOR)


def superres(scale: int, *, noise: float = 0.0) -> Degradation:
    """Only the means of blocks of scale x scale pixels are observed. The trivial reconstruction is
    bicubic interpolation.
    """

    def operator(images: Tensor) -> Tensor:
        return F.avg_pool2d(images, scale)

    def fill(observed: Tensor) -> Tensor:
        # Bicubic weights are partly negative and overshoot at edges.
        return F.interpolate(observed, scale_factor=scale, mode="bicubic").clamp(-1, 1)

    return Degradation(f"superres x{scale}", operator, fill, noise=noise, prior=_PRIOR)


def denoise(noise: float) -> Degradation:
    """Gaussian noise is added. The trivial reconstruction is the noisy image.

    Raises `ConfigError` without noise.
    """
    if noise <= 0:
        raise ConfigError("denoising needs noise: a standard deviation above 0")
    return Degradation("denoise", lambda images: images, lambda seen: seen.clamp(-1, 1), noise)


def deblur(sigma: float, *, noise: float = 0.0) -> Degradation:
    """Gaussian blur of standard deviation `sigma` in pixels, mirrored at the edges, cut at 3 sigma.

    The trivial reconstruction is the blurred image. Raises `ConfigError` for a sigma not above 0.
    """
    if sigma <= 0:
        raise ConfigError("deblurring needs a blur: a standard deviation above 0 pixels")
    # Beyond 3 sigma lie 0.3 % of a Gaussian's weight; the rest is scaled to 1, so that flat images
    # stay.
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    weights = weights / weights.sum()

    def operator(images: Tensor) -> Tensor:
        if radius >= min(images.shape[2:]):
            raise ConfigError(
                f"a blur of {sigma:g} pixels is too wide for {images.shape[3]} pixels"
            )
        channels = images.shape[1]
        kernel = weights.to(images).expand(channels, 1, -1)
        padded = F.pad(images, [radius] * 4, mode="reflect")
        rows = F.conv2d(padded, kernel[:, :, None, :], groups=channels)
        return F.conv2d(rows, kernel[:, :, :, None], groups=channels)

    return Degradation(
        "deblur", operator, lambda seen: seen.clamp(-1, 1), noise=noise, prior=_PRIOR
    )


def colourise(*, noise: float = 0.0) -> Degradation:
    """Only the brightness of RGB images is observed. The trivial reconstruction is gray."""

    def operator(images: Tensor) -> Tensor:
        if images.shape[1] != 3:
            raise ConfigError(
                f"colourise needs RGB images, not images of {images.shape[1]} channels"
            )
        weights = images.new_tensor(_LUMA)[:, None, None]
        return (images * weights).sum(1, keepdim=True)

    def fill(observed: Tensor) -> Tensor:
        return observed.expand(-1, 3, -1, -1).clamp(-1, 1)

    return Degradation("colourise", operator, fill, noise=noise, prior=_PRIOR)


def build_degradation(
    task: str,
    shape: tuple[int, int, int],
    *,
    mask: str | None = None,
    scale: int | None = None,
    blur: float | None = None,
    noise: float | None = None,
    seed: int = 0,
) -> Degradation:
    """The degradation of a task, for images of a shape (C, H, W).

    Args:
        task: one of `TASKS`.
        shape: of the images.
        mask: for inpaint alone, see `build_mask`; None is "half".
        scale: for superres alone: pixels a side of a block; None is 4.
        blur: for deblur alone: the standard deviation in pixels; None is 1.5.
        noise: standard deviation on the scale of 0 to 255; None is 25 for denoise, else 0.
        seed: of a random mask.

    Raises `ConfigError` for an unknown task or settings that it cannot have.
    """
    _, height, width = shape
    size = (noise or 0.0) / _HALF_RANGE
    for option, value, owner in (
        ("mask", mask, "inpaint"),
        ("scale", scale, "superres"),
        ("blur", blur, "deblur"),
    ):
        if value is not None and task != owner:
            raise ConfigError(f"--{option} is for {owner}: leave it, or choose --task {owner}")
    if task == "identity":
        if size:
            raise ConfigError("identity takes no noise: the task with noise alone is denoise")
        return identity()
    if task == "inpaint":
        return inpaint(build_mask(mask or "half", height, width, seed=seed), noise=size)
    if task == "superres":
        scale = 4 if scale is None else scale
        if height % scale or width % scale:
            raise ConfigError(f"blocks of {scale} pixels do not divide images of {width}x{height}")
        return superres(scale, noise=size)
    if task == "denoise":
        return denoise(_NOISE / _HALF_RANGE if noise is None else size)
    if task == "deblur":
        return deblur(1.5 if blur is None else blur, noise=size)
    if task == "colourise":
        return colourise(noise=size)
    raise ConfigError(f"task {task!r}: expected one of {', '.join(TASKS)}")


def build_mask(name: str, height: int, width: int, *, seed: int = 0) -> Tensor:
    """A mask of the missing pixels, bool (height, width).

    Args:
        name: `half`, the right half; `centre`, a square of half the side; `random`, three quarters
            of all pixels; or a picture of this size, white where pixels are missing.

    Raises `ConfigError` for a picture that cannot be read or has another size.
    """
    if name == "half":
        return (torch.arange(width) >= width // 2).expand(height, width)
    if name == "centre":
        rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
        inside = (rows >= height // 4) & (rows < height - height // 4)
        return inside & (columns >= width // 4) & (columns < width - width // 4)
    if name == "random":
        generator = torch.Generator().manual_seed(seed_for(seed, "mask"))
        return torch.rand(height, width, generator=generator) < 0.75
    return _read_mask(name, height, width)


def _read_mask(path: str, height: int, width: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    try:
        picture = decode_image(path, mode=ImageReadMode.GRAY)[0]
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--mask {path}: expected half, centre, random or a picture ({reason})"
        ) from None
    if picture.shape != (height, width):
        size = f"{picture.shape[1]}x{picture.shape[0]}"
        raise ConfigError(f"--mask {path} is {size}, the images are {width}x{height}")
    missing: Tensor = picture > 127
    return missing
