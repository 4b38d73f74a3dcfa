"""Sums over the values of a set, from which its means, deviations and extremes follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Sums"]


@dataclass(frozen=True)
class Sums:
    """Over the values of some images, each (C,): int64 of pixels, and exact; float64 of floats."""

    count: NDArray[Any]
    total: NDArray[Any]
    squares: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]

    @classmethod
    def of(cls, values: NDArray[Any]) -> Sums:
        """Of one image, (C, H, W)."""
        wide = np.int64 if values.dtype == np.uint8 else np.float64
        rows = values.reshape(len(values), -1).astype(wide)
        count = np.full(len(rows), rows.shape[1], dtype=np.int64)
        low, high = rows.min(axis=1), rows.max(axis=1)
        return cls(count, rows.sum(axis=1), np.square(rows).sum(axis=1), low, high)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )

    @property
    def mean(self) -> NDArray[np.float64]:
        """Of each channel."""
        mean: NDArray[np.float64] = self.total / self.count
        return mean

    @property
    def std(self) -> NDArray[np.float64]:
        """Of each channel."""
        std: NDArray[np.float64] = np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0))
        return std
