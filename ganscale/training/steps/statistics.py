"""The statistics of an update: sums over samples, which add up over the parts of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor


def summed(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """By name, the sum of what all parts of a batch have; the parts have the same names."""
    # Without the 0 that the built-in sum begins with, which would be one more kernel each.
    return {name: reduce(torch.add, [part[name] for part in parts]) for name in parts[0]}
