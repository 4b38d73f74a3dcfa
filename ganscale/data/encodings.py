"""The two forms an image is stored in: 8-bit pixels as PNG, floats as npy. The index says which.

Both are lossless. All that depends on the form is in an `Encoding`, so order, stores, caches and
checks are the same for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ganscale.data.arrays import decode_npy, normalised_npy
from ganscale.data.images import Fit, Normalised, decode, normalised_png


class _Normalise(Protocol):
    def __call__(
        self,
        data: bytes,
        *,
        resolution: int | None = None,
        img_channels: int | None = None,
        background: str = "white",
        fit: Fit = "crop",
    ) -> Normalised: ...


@dataclass(frozen=True)
class Encoding:
    """How images (C, H, W) become bytes, and bytes images. Both raise `DataError`."""

    suffix: str
    """Of the members in the shards that are written here."""
    dtype: np.dtype[Any]
    noun: str
    """What one of them is called in messages."""
    decode: Callable[[bytes, tuple[int, int, int]], NDArray[Any]] = field(repr=False)
    """The values of stored bytes, given the shape. An image of another shape is refused."""
    normalised: _Normalise = field(repr=False)
    """Converts an image of any kind to the form in which it is stored."""


PNG = Encoding("png", np.dtype(np.uint8), "image", decode, normalised_png)
NPY = Encoding("npy", np.dtype(np.float32), "array of floats", decode_npy, normalised_npy)
ENCODINGS = {encoding.dtype.name: encoding for encoding in (PNG, NPY)}
"""By the name of the values' type."""
