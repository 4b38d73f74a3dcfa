"""What an image's stored values are to the networks: which of them become -1 and 1, and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class ValueRange:
    """Values of one type: `low` becomes -1 and `high` 1, linearly; what lies outside is clipped.

    Raises `ValueError` if the range is empty, or too narrow or too wide for float32.
    """

    dtype: Literal["uint8", "float32"]
    low: float
    high: float

    def __post_init__(self) -> None:
        # Checked by half the width, which is what values are divided by: it must be a normal
        # float32, and twice of it, the whole width, must not overflow.
        half = np.float64(self._half)
        limits = np.finfo(np.float32)
        if not (self.low < self.high and limits.tiny <= half <= limits.max / 2):
            raise ValueError(f"a range from {self.low} to {self.high}, of a width {2 * half}")
        if self.dtype not in ("uint8", "float32"):
            raise ValueError(f"values of type {self.dtype}, expected uint8 or float32")

    @classmethod
    def parse(cls, data: dict[str, Any] | None) -> ValueRange:
        """What `to_json` gave; none is that of pixels. Raises `TypeError` or `ValueError`."""
        return PIXELS if data is None else cls(**data)

    def to_json(self) -> dict[str, Any] | None:
        """As plain values; None for pixels, which need not be described."""
        return None if self == PIXELS else asdict(self)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The type of the stored values."""
        return np.dtype(self.dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the stored values."""
        import torch

        return cast(torch.dtype, getattr(torch, self.dtype))

    def to_network(self, values: Tensor) -> Tensor:
        """Stored values as float32 in [-1, 1]."""
        scaled = values.float()
        if self.dtype != "uint8":  # which has nothing to be clipped
            scaled = scaled.clamp(self.low, self.high) - self.low
        return scaled / self._half - 1

    def from_network(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] as stored values; whole numbers are rounded to, the rest is clamped."""
        stored = images.float() * self._half + (self.low + self._half)
        if self.dtype == "uint8":
            stored = stored.round()
        return stored.clamp(self.low, self.high).to(self.torch_dtype)

    @property
    def _half(self) -> float:
        # Halved before subtracting: the difference of two large floats may overflow.
        return self.high / 2 - self.low / 2


PIXELS = ValueRange("uint8", 0.0, 255.0)
"""8-bit pixels."""
