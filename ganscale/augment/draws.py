"""The random numbers of an augmentation: drawn for a whole batch, read sample by sample.

Every sample's numbers are its own row, and every transform's are its own columns, so a rank that
takes its slots of the global batch's rows does to them what one process would have done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Random numbers for some samples, a row each."""

    uniform: Tensor
    """(n, K_u) in [0, 1)."""
    normal: Tensor
    """(n, K_n), standard normal."""

    def __getitem__(self, rows: Tensor) -> Draws:
        """Choose samples: `rows` are their places (int64) or a mask (bool)."""
        return Draws(self.uniform[rows], self.normal[rows])

    def packed(self) -> Tensor:
        """Return all numbers as one table, (n, K_u + K_n): a step's inputs are plain tensors."""
        return torch.cat((self.uniform, self.normal), 1)


@dataclass(frozen=True)
class Columns:
    """Where each transform finds its numbers, and how many columns there are in all."""

    first: Mapping[str, tuple[int, int]]
    """A transform's first uniform and its first normal column."""
    num_uniform: int
    num_normal: int

    @classmethod
    def lay_out(cls, widths: Mapping[str, tuple[int, int]]) -> Columns:
        """Give transforms of these widths, (uniform, normal), their columns in the order given."""
        first: dict[str, tuple[int, int]] = {}
        uniform = normal = 0
        for name, (num_uniform, num_normal) in widths.items():
            first[name] = (uniform, normal)
            uniform, normal = uniform + num_uniform, normal + num_normal
        return cls(first, uniform, normal)


@dataclass(frozen=True)
class Chances:
    """One call's draws, turned into what each of its n samples is to undergo.

    A transform's first uniform number decides whether a sample executes it: with probability p
    times the transform's weight. A sample that does not, and all samples for a transform that is
    absent, get the parameter that changes nothing. Results have shape (n,) and the dtype of the
    draws, but for `happens`, which is boolean.
    """

    draws: Draws
    columns: Columns
    weights: Mapping[str, float]
    p: Tensor | float

    def uniform(self, name: str, column: int) -> Tensor:
        """Return the transform's uniform numbers of a column, in [0, 1); zeros if it is absent."""
        if name not in self.columns.first:
            return self._fill(0.0)
        return self.draws.uniform[:, self.columns.first[name][0] + column]

    def normal(self, name: str, column: int = 0) -> Tensor:
        """Return the transform's normal numbers of a column; zeros if it is absent."""
        if name not in self.columns.first:
            return self._fill(0.0)
        return self.draws.normal[:, self.columns.first[name][1] + column]

    def happens(self, name: str) -> Tensor:
        """Tell which samples execute a transform, (n,) bool."""
        # p may be a tensor on the device that a step moves (ADA); nothing is read back to compare.
        # One number decides all parameters of a transform, so they come together.
        return self.uniform(name, 0) < self.p * self.weights.get(name, 0.0)

    def choose(self, name: str, value: Tensor, otherwise: float = 0.0) -> Tensor:
        """Return `value` where the transform is executed."""
        # Every sample's value is computed and some are thrown away: which samples need it is known
        # on the device alone.
        return torch.where(self.happens(name), value, otherwise)

    def gain(self, name: str, std: float) -> Tensor:
        """Return 2 ** N(0, std ** 2) where the transform is executed, else 1."""
        # Log-normal, so that magnifying by a factor is as likely as shrinking by it.
        return self.choose(name, torch.exp2(self.normal(name) * std), 1.0)

    def turn(self, name: str) -> Tensor:
        """Return an angle uniform in [-pi, pi) where the transform is executed, else 0."""
        return self.choose(name, (2 * self.uniform(name, 1) - 1) * math.pi)

    def half_turns(self, name: str) -> tuple[Tensor, Tensor]:
        """Return two angles, each executed with the chance that leaves p for at least one.

        Two independent chances q leave (1 - q) ** 2 = 1 - p for neither (appendix B).
        """
        chance = 1 - (1 - self.p * self.weights.get(name, 0.0)) ** 0.5
        angles = []
        for column in (0, 2):
            angle = (2 * self.uniform(name, column + 1) - 1) * math.pi
            angles.append(torch.where(self.uniform(name, column) < chance, angle, 0.0))
        return angles[0], angles[1]

    def shift(self, name: str, limit: float) -> Tensor:
        """Return (n, 2), each axis uniform in [-limit, limit), where executed, else 0."""
        axes = [(2 * self.uniform(name, column) - 1) * limit for column in (1, 2)]
        return torch.stack([self.choose(name, axis) for axis in axes], 1)

    def _fill(self, value: float) -> Tensor:
        uniform = self.draws.uniform
        return uniform.new_full((len(uniform),), value)
