"""A CIFAR-shaped set drawn from formulas, for machines with neither the data nor a network.

Ten classes of 32x32 RGB pictures: a shape of one colour on a shaded background of another, with
place, size, angle and colours at random. Picture i of a split is the same everywhere; the set has
enough structure that a GAN visibly learns it, and says nothing about CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RESOLUTION = 32
SPLIT_SIZES = {"train": 50_000, "test": 10_000}
_SPLIT_SEEDS = {"train": 1, "test": 2}

# Each shape maps coordinates (u, v), in which it fills about [-1, 1]^2, to a signed distance that
# is negative inside.
_SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda u, v: np.hypot(u, v) - 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.85,
    "diamond": lambda u, v: np.abs(u) + np.abs(v) - 1.1,
    "triangle": lambda u, v: np.maximum(np.abs(u) * 1.73 + v, -v * 2) * 0.6 - 0.6,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.8) - 0.25,
    "cross": lambda u, v: np.minimum(
        np.maximum(np.abs(u) - 1, np.abs(v) - 0.3), np.maximum(np.abs(v) - 1, np.abs(u) - 0.3)
    ),
    "bar": lambda u, v: np.maximum(np.abs(u) - 1.1, np.abs(v) - 0.3),
    "stripes": lambda u, v: np.maximum(np.cos(7 * u) * 0.4, np.hypot(u, v) - 1.1),
    "checks": lambda u, v: np.maximum(np.cos(5 * u) * np.cos(5 * v) * 0.5, np.hypot(u, v) - 1.1),
    "moon": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.85 - np.hypot(u - 0.5, v)),
}

CLASSES = tuple(_SHAPES)


def procedural_image(split: str, index: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Draw picture `index` of a split: uint8 of shape (32, 32, 3), and its label in 0..9."""
    # A counter-based generator for each picture: any of them is drawn without those before it, by
    # any process.
    rng = np.random.Generator(np.random.Philox(key=[_SPLIT_SEEDS[split], index]))
    label = index % len(CLASSES)
    grid = (np.arange(RESOLUTION) + 0.5) / RESOLUTION * 2 - 1
    x, y = np.meshgrid(grid, grid)
    centre_x, centre_y = rng.uniform(-0.25, 0.25, 2)
    size = rng.uniform(0.4, 0.75)
    angle = rng.uniform(-0.5, 0.5)
    u = ((x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)) / size
    v = ((y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)) / size
    distance = _SHAPES[CLASSES[label]](u, v)
    # Anti-aliased: the share of a pixel inside the shape goes linearly with the distance.
    cover = np.clip(0.5 - distance * size * RESOLUTION / 2, 0, 1)[..., None]
    colour, ground = _distinct_colours(rng)
    direction = rng.uniform(0, 2 * np.pi)
    shade = 1 + 0.25 * (x * np.cos(direction) + y * np.sin(direction))[..., None]
    picture = cover * colour + (1 - cover) * ground * shade
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8), label


def _distinct_colours(rng: np.random.Generator) -> tuple[Array, Array]:
    colour = rng.uniform(0, 1, 3)
    ground = rng.uniform(0, 1, 3)
    # Else the shape could not be seen. The opposite colour needs no loop of further draws.
    if np.abs(colour - ground).max() < 0.4:
        ground = (colour + 0.5) % 1
    return colour, ground
