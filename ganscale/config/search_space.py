"""What a field may be in a sweep: how it is drawn, and how it changes when a trial explores.

A draw is a function of the sweep's seed, the trial's number and the field. So adding a field or
more trials leaves the values of the others as they were, and a sweep that is extended keeps its
results.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

from pydantic import Field, model_validator

from ganscale.config.section import Section

_KINDS = ("choice", "grid", "uniform", "loguniform", "integers")

Bounds = tuple[float, float]


class Domain(Section):
    """The values of one field: exactly one of the kinds."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these, drawn."""
    grid: tuple[Any, ...] | None = Field(None, min_length=1)
    """Each of these, with each of the other grids."""
    uniform: Bounds | None = None
    """A number from [low, high]."""
    loguniform: Bounds | None = None
    """A number from [low, high], whose logarithm is uniform."""
    integers: tuple[int, int] | None = None
    """A whole number from low to high, both included."""
    relative: bool = False
    """The value is a factor of what the base has; of a schedule, of its values everywhere."""

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, value: Any) -> Any:
        kinds = [name for name in _KINDS if isinstance(value, dict) and name in value]
        if len(kinds) != 1:
            raise ValueError(f"expected one of {', '.join(_KINDS)}, such as {{choice: [1, 2]}}")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> Domain:
        low, high = self.bounds or (0.0, 1.0)
        if not low < high:
            raise ValueError(f"expected [low, high] with low < high, got [{low:g}, {high:g}]")
        if self.loguniform and low <= 0:
            raise ValueError(f"loguniform needs numbers above 0, got {low:g}")
        return self

    @property
    def bounds(self) -> Bounds | None:
        """Lowest and highest value; None for values of a list."""
        return self.uniform or self.loguniform or self.integers

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of a list."""
        return self.choice or self.grid or ()

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that are valid only if all are: the bounds, or every one of a list."""
        return self.bounds or self.values

    def draw(self, generator: random.Random) -> Any:
        """A value of the domain; for a grid, any of its values."""
        if self.uniform:
            return _rounded(generator.uniform(*self.uniform), self.uniform)
        if self.loguniform:
            low, high = self.loguniform
            exponent = generator.uniform(math.log(low), math.log(high))
            return _rounded(math.exp(exponent), self.loguniform)
        if self.integers:
            return generator.randint(*self.integers)
        return generator.choice(self.values)

    def explored(
        self, value: Any, factors: Bounds, resample: float, generator: random.Random
    ) -> Any:
        """Another value near `value`: times one of `factors`, within the bounds.

        Whole numbers move by one at least; of a list, it is a neighbour. With probability
        `resample` it is drawn anew.
        """
        if generator.random() < resample:
            return self.draw(generator)
        is_up = generator.random() < 0.5
        if self.bounds is None:
            place = self.values.index(value) + (1 if is_up else -1)
            return self.values[min(max(place, 0), len(self.values) - 1)]
        low, high = self.bounds
        moved = value * (max(factors) if is_up else min(factors))
        if self.integers:
            moved = max(round(moved), value + 1) if is_up else min(round(moved), value - 1)
        return min(max(moved, low), high)


def drawn(space: dict[str, Domain], seed: int, number: int) -> dict[str, Any]:
    """The values of a trial; grids in the order of their product, the last field fastest."""
    grids = [name for name, domain in space.items() if domain.grid]
    points = list(itertools.product(*(space[name].values for name in grids)))
    point = dict(zip(grids, points[number % len(points)], strict=True))
    return {
        name: point[name] if name in point else domain.draw(generator_for(seed, number, name))
        for name, domain in space.items()
    }


def generator_for(*purpose: object) -> random.Random:
    """Random numbers that are a function of the purpose, the same in every process."""
    # By a string, which Python hashes with sha512: the same in every process and version, unlike
    # the hash of a tuple.
    return random.Random("/".join(map(str, purpose)))


def _rounded(value: float, bounds: Bounds) -> float:
    """To four digits, which people can read, and within the bounds."""
    return min(max(float(f"{value:.4g}"), bounds[0]), bounds[1])
