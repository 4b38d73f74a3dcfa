"""Augmentation of images before the discriminator, in both phases; differentiable twice.

The transforms are those of ADA (Karras et al. 2020, arXiv 2006.06676, appendix B) and DiffAugment
(Zhao et al. 2020, arXiv 2006.10738). Random numbers come from outside, a row per sample, so what a
sample undergoes depends on its own row alone; no value is ever read back from the device. All
arithmetic is in fp32 (float64 for float64 images), also inside autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ganscale.augment.colour import jitter_colour, recolour
from ganscale.augment.draws import Chances, Columns, Draws
from ganscale.augment.geometry import (
    cut_out,
    inverse_motion,
    move_whole_pixels,
    resample,
    shift_into_zeros,
)

TRANSFORMS: dict[str, tuple[int, int]] = {
    # ADA
    "xflip": (2, 0),
    "rotate90": (2, 0),
    "xint": (3, 0),
    "scale": (1, 1),
    "rotate": (4, 0),
    "aniso": (1, 1),
    "xfrac": (1, 2),
    "brightness": (1, 1),
    "contrast": (1, 1),
    "lumaflip": (2, 0),
    "hue": (2, 0),
    "saturation": (1, 1),
    # DiffAugment
    "colour": (4, 0),
    "translation": (3, 0),
    # both
    "cutout": (3, 0),
}
"""Every transform, in the order of its columns, and how many uniform and normal ones it has.

The first uniform column decides whether a sample executes it.
"""


def _move_whole_pixels(images: Tensor, chances: Chances) -> Tensor:
    mirror = chances.happens("xflip") & (chances.uniform("xflip", 1) < 0.5)
    quarters = chances.choose("rotate90", (chances.uniform("rotate90", 1) * 4).floor())
    shift = chances.shift("xint", images.shape[-1] / 8).round()
    return move_whole_pixels(images, mirror, quarters.long(), shift.long())


def _resample(images: Tensor, chances: Chances) -> Tensor:
    before, after = chances.half_turns("rotate")
    shift = torch.stack([chances.choose("xfrac", chances.normal("xfrac", axis)) for axis in (0, 1)])
    # Four transforms make one matrix, so an image is filtered once and not four times.
    inverse = inverse_motion(
        chances.gain("scale", 0.2),
        before,
        chances.gain("aniso", 0.2),
        after,
        shift.T * images.shape[-1] / 8,
    )
    return resample(images, inverse)


def _recolour(images: Tensor, chances: Chances) -> Tensor:
    # Contrast scales luma and chroma, saturation chroma alone, and a luma flip mirrors luma:
    # products of matrices that commute become products of numbers.
    contrast = chances.gain("contrast", 0.5)
    flip = chances.happens("lumaflip") & (chances.uniform("lumaflip", 1) < 0.5)
    return recolour(
        images,
        luma_shift=chances.choose("brightness", chances.normal("brightness") * 0.2),
        luma_gain=torch.where(flip, -contrast, contrast),
        chroma_gain=contrast * chances.gain("saturation", 1.0),
        hue=chances.turn("hue"),
    )


def _jitter_colour(images: Tensor, chances: Chances) -> Tensor:
    return jitter_colour(
        images,
        brightness=chances.choose("colour", chances.uniform("colour", 1) - 0.5),
        saturation=chances.choose("colour", chances.uniform("colour", 2) * 2, 1.0),
        contrast=chances.choose("colour", chances.uniform("colour", 3) + 0.5, 1.0),
    )


def _translate(images: Tensor, chances: Chances) -> Tensor:
    # Whole shifts -m..m are equally likely: cells of width 1 around them share [-m - 1/2, m + 1/2).
    limit = int(images.shape[-1] / 8 + 0.5)
    return shift_into_zeros(
        images, (chances.shift("translation", limit + 0.5) + 0.5).floor().long()
    )


def _cut_out(images: Tensor, chances: Chances) -> Tensor:
    centre = torch.stack([chances.uniform("cutout", column) for column in (1, 2)], 1)
    return cut_out(images, centre, chances.happens("cutout"))


# In the order in which they are applied, which is the papers'. What one stage does together is one
# pass over the images.
_STAGES: tuple[tuple[frozenset[str], Callable[[Tensor, Chances], Tensor]], ...] = (
    (frozenset({"xflip", "rotate90", "xint"}), _move_whole_pixels),
    (frozenset({"scale", "rotate", "aniso", "xfrac"}), _resample),
    (frozenset({"brightness", "contrast", "lumaflip", "hue", "saturation"}), _recolour),
    (frozenset({"colour"}), _jitter_colour),
    (frozenset({"translation"}), _translate),
    (frozenset({"cutout"}), _cut_out),
)


class Augmentation:
    """A set of transforms, each executed per sample with probability p times its weight.

    `transforms` maps names (those of `TRANSFORMS`) to weights in [0, 1]. They are applied in a
    fixed order, whatever the mapping's. Images are square, (n, C, R, R) with C 1, 3 or 4, floats
    in [-1, 1]; results are fp32 (float64 for float64 images) and may leave that range.
    """

    def __init__(self, transforms: Mapping[str, float]) -> None:
        if unknown := sorted(set(transforms) - set(TRANSFORMS)):
            raise ValueError(
                f"unknown augmentation transforms {', '.join(unknown)}; "
                f"choose from {', '.join(TRANSFORMS)}"
            )
        for name, weight in transforms.items():
            if not 0 <= weight <= 1:
                raise ValueError(f"the weight of {name} must be within [0, 1], got {weight}")
        # In the order of `TRANSFORMS`, since columns and stages follow it.
        self.weights = {name: transforms[name] for name in TRANSFORMS if name in transforms}
        self._columns = Columns.lay_out({name: TRANSFORMS[name] for name in self.weights})
        self._stages = [stage for names, stage in _STAGES if names & set(self.weights)]

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Draw the numbers of a (global) batch on the generator's device."""
        uniform = (batch_size, self._columns.num_uniform)
        normal = (batch_size, self._columns.num_normal)
        return Draws(
            torch.rand(uniform, generator=generator, device=generator.device),
            torch.randn(normal, generator=generator, device=generator.device),
        )

    def unpacked(self, table: Tensor) -> Draws:
        """Return the draws whose `packed` table, or some rows of it, this is."""
        num_uniform, num_normal = self._columns.num_uniform, self._columns.num_normal
        return Draws(*table.split((num_uniform, num_normal), 1))

    def __call__(self, images: Tensor, draws: Draws, p: Tensor | float) -> Tensor:
        """Augment n images with n rows of draws, all on one device; p is within [0, 1]."""
        # A tensor is not checked, as that would be a host read; ADA clamps its own.
        if not isinstance(p, Tensor) and not 0 <= p <= 1:
            raise ValueError(f"the augmentation probability p must be within [0, 1], got {p}")
        assert images.shape[1] in (1, 3, 4)
        assert images.shape[2] == images.shape[3] >= 2
        assert len(images) == len(draws.uniform)
        # Autocast would take the filters' matrix products in half precision, where the two filters
        # of a move no longer undo each other.
        with torch.autocast(images.device.type, enabled=False):
            images = images if images.dtype == torch.float64 else images.float()
            draws = Draws(draws.uniform.to(images.dtype), draws.normal.to(images.dtype))
            chances = Chances(draws, self._columns, self.weights, p)
            for stage in self._stages:
                images = stage(images, chances)
        return images


AUGMENTATIONS: dict[str, dict[str, float]] = {
    "diffaugment": dict.fromkeys(("colour", "translation", "cutout"), 1.0),
    "ada": dict.fromkeys(
        ("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac")
        + ("brightness", "contrast", "lumaflip", "hue", "saturation"),
        1.0,
    ),
    "r3gan": dict.fromkeys(
        ("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac", "cutout"), 1.0
    )
    | dict.fromkeys(("brightness", "contrast", "lumaflip", "hue", "saturation"), 0.5),
    "flip_translate": dict.fromkeys(("xflip", "xint"), 1.0),
}
"""Named sets of transforms: what `Augmentation` takes.

`diffaugment` is the paper's at p = 1; `ada` is the paper's "bgc"; `r3gan` is that of Huang et al.
(2024, arXiv 2501.05441), with colours at half weight and cutout; `flip_translate` is that of
consistency regularisation (Zhang et al. 2020, arXiv 1910.12027).
"""
