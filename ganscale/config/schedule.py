"""Values that change with the position in the run: constant, or moved from one to another.

In a configuration it is a number, or `{start: 2e-4, end: 5e-5, kimg: 20000, shape: cosine}`. It is
a function of the position alone, so a checkpoint need not hold anything of it, and a run that
resumes, with any number of workers, has the same values.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ganscale.config.section import Section


class Schedule(Section):
    """A value for every position; after `kimg` it stays at `end`."""

    start: float
    """Value at the beginning of the run."""
    end: float
    """Value from `kimg` on."""
    kimg: float = Field(gt=0)
    """Thousands of real images over which it moves."""
    shape: Literal["constant", "linear", "cosine"]
    """How it moves; cosine starts and ends slowly."""

    @classmethod
    def constant(cls, value: float) -> Schedule:
        """The same value everywhere."""
        return cls(start=value, end=value, kimg=1.0, shape="constant")

    def at(self, nimg: int) -> float:
        """The value when `nimg` real images were consumed."""
        way = min(nimg / (1000 * self.kimg), 1.0)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.start + (self.end - self.start) * way

    @property
    def is_zero(self) -> bool:
        """Whether the value is always zero."""
        return self.start == self.end == 0

    @property
    def is_constant(self) -> bool:
        """Whether the value is the same everywhere."""
        return self.start == self.end

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        # A string as well: YAML takes "2e-4", without a dot, for one. Not a boolean, which is an
        # int.
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return {"start": value, "end": value, "kimg": 1.0, "shape": "constant"}
        return value

    @model_validator(mode="after")
    def _constant_is_constant(self) -> Schedule:
        if self.shape == "constant" and self.start != self.end:
            raise ValueError("shape: constant, but start and end differ: say linear or cosine")
        return self

    # A constant is written as the number it was given as: configurations stay readable, and two
    # spellings of one value are equal when settings are compared.
    @model_serializer(mode="wrap")
    def _to_number(self, handler: SerializerFunctionWrapHandler) -> Any:
        return self.start if self.shape == "constant" else handler(self)


def within(low: float, high: float = math.inf, *, above: bool = False) -> AfterValidator:
    """A bound on both ends of a schedule: low <= value <= high, or low < value with `above`."""

    def check(schedule: Schedule) -> Schedule:
        for value in (schedule.start, schedule.end):
            if not low <= value <= high or (above and value == low):
                wanted = f"above {low:g}" if above else f"at least {low:g}"
                limit = "" if high == math.inf else f" and at most {high:g}"
                raise ValueError(f"expected values {wanted}{limit}, got {value:g}")
        return schedule

    return AfterValidator(check)
