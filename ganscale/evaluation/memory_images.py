"""Images that a program holds in memory, as a set that is evaluated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ganscale.data.images import CHANNELS
from ganscale.errors import DataError
from ganscale.evaluation.image_sets import Indices

HeldImages = Tensor | NDArray[Any] | Sequence[Image.Image]
"""A tensor (N, C, H, W) of uint8 or of floats in [0, 1], an array (N, H, W, C) of uint8, or a list
of Pillow images of one size in mode L, RGB or RGBA: what calling a `Generator` returns."""


class MemoryImages:
    """Images without labels; `pixels` is uint8, (N, C, H, W), on the CPU."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self.description = f"{len(pixels)} images in memory"
        channels, height, width = pixels.shape[1:]
        self.shape = (channels, height, width)
        self.labels: Indices | None = None
        self.classes: Sequence[str] = ()

    @classmethod
    def of(cls, images: HeldImages) -> MemoryImages:
        """Images in one of the forms of `HeldImages`; raises `DataError` for others."""
        if not len(images):
            raise DataError("expected at least one image")
        if isinstance(images, Tensor):
            return cls(_pixels_of(images.detach().cpu()))
        if not isinstance(images, np.ndarray):
            images = _array_of(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3, 4):
            raise DataError(
                f"an array of {images.dtype} {images.shape}: expected uint8 (N, H, W, C) with 1, 3 "
                "or 4 channels"
            )
        return cls(torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, 1).contiguous())

    @cached_property
    def digest(self) -> str:
        """The sha256 of the shape and all pixels."""
        digest = hashlib.sha256(str(tuple(self.pixels.shape)).encode())
        digest.update(self.pixels.numpy().data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: Indices) -> Tensor:
        return self.pixels[torch.from_numpy(indices)]


def _array_of(images: Sequence[Image.Image]) -> NDArray[np.uint8]:
    """Pillow images of one size as an array (N, H, W, C)."""
    for image in images:
        if not isinstance(image, Image.Image):
            raise DataError(
                f"a list of {type(image).__name__}: expected Pillow images, or one array "
                "(N, H, W, C) or tensor (N, C, H, W) of all images"
            )
        # The numbers of other modes are no gray or colours, though they may have as many channels:
        # "P" has indices into a palette, "YCbCr" and "CMYK" have other coordinates.
        if image.mode not in CHANNELS:
            raise DataError(
                f"a Pillow image in mode {image.mode}: expected {', '.join(CHANNELS)}; "
                'image.convert("RGB") makes one'
            )
    sizes = {(image.size, image.mode) for image in images}
    if len(sizes) > 1:
        raise DataError(f"images have several sizes or modes: {sorted(sizes)}")
    return np.stack([np.atleast_3d(np.array(image)) for image in images])


def _pixels_of(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4):
        raise DataError(
            f"a tensor of shape {tuple(images.shape)}: expected (N, C, H, W) with 1, 3 or 4 "
            "channels"
        )
    if images.dtype == torch.uint8:
        return images.contiguous()
    # A range of -1 to 1 would be cut off at half of it without a word.
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        raise DataError(
            f"a tensor of {images.dtype} from {images.min():.3g} to {images.max():.3g}: expected "
            "uint8, or floats from 0 to 1"
        )
    return (images.float() * 255).round().to(torch.uint8).contiguous()
