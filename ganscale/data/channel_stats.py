"""Statistics of each channel of a set's images, which can be added up over shards.

Sums and not running means: they can be added in any grouping, so several processes each take a part
of the set, and for pixels the result is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ChannelStats:
    """Number, sums and extremes of the values of some images, each of shape (C,).

    Those of pixels are int64 and exact, those of floats are float64.
    """

    count: NDArray[Any]
    total: NDArray[Any]
    squares: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]

    @classmethod
    def of(cls, values: NDArray[Any]) -> ChannelStats:
        """The statistics of one image, (C, H, W)."""
        # A sum of squares of 8-bit pixels overflows int64 only after 10**14 of them.
        wide = np.int64 if values.dtype == np.uint8 else np.float64
        rows = values.reshape(len(values), -1).astype(wide)
        count = np.full(len(rows), rows.shape[1], dtype=np.int64)
        low, high = rows.min(axis=1), rows.max(axis=1)
        return cls(count, rows.sum(axis=1), np.square(rows).sum(axis=1), low, high)

    def __add__(self, other: ChannelStats) -> ChannelStats:
        return ChannelStats(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean of each channel, (C,)."""
        mean: NDArray[np.float64] = self.total / self.count
        return mean

    @property
    def std(self) -> NDArray[np.float64]:
        """The population standard deviation of each channel, (C,)."""
        # Rounding can make the difference slightly negative for a channel that is constant.
        std: NDArray[np.float64] = np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0))
        return std
