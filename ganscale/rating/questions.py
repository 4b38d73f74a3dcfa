"""Which questions a rater is asked: a function of the seed, the rater's name, the task and number.

So a session needs no state but the answers given, and no two raters see the same images in the same
order. Every kind of image comes equally often, in random order, and a rater sees no image twice,
since an image that was seen before is rated by memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

Task = Literal["realness", "preference"]

ANSWERS: dict[Task, tuple[str, str]] = {
    "realness": ("fake", "real"),
    "preference": ("left", "right"),
}
"""The possible answers to a task's questions."""

REAL = "real"
"""The contestant that no generator made."""

Names = tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """Image number `index` of a contestant."""

    contestant: str
    index: int


@dataclass(frozen=True)
class Question:
    """One image to be called real or fake, or two of which the left or right is better."""

    number: int
    """The place in the rater's order, from 1."""
    pictures: tuple[Picture, ...]


def questions_for(
    rater: str, *, task: Task, num: int, seed: int, pools: Mapping[str, int]
) -> tuple[Question, ...]:
    """A rater's questions in the order in which they are asked.

    Args:
        rater: name; equal names are asked equal questions.
        task: "realness" asks for as many real as fake images, the fakes shared equally among the
            runs; "preference" shows every pair of contestants equally often, either one on the left
            equally often. A remainder is distributed at random.
        num: how many questions; even for realness.
        seed: of everything that is drawn.
        pools: how many images each contestant has, at least `num_needed`.
    """
    # A hash and not Python's `hash`, which differs between processes: a restarted server must ask
    # the same questions.
    key = f"{seed}/{task}/{num}/{rater}".encode()
    random = np.random.default_rng(list(hashlib.sha256(key).digest()))
    contestants = list(pools)
    shown = _single(contestants, num, random) if task == "realness" else _pairs(pools, num, random)
    # Each contestant's images are dealt from one shuffled deck, so that none comes twice.
    decks = {name: iter(random.permutation(size).tolist()) for name, size in pools.items()}
    order = random.permutation(num)
    return tuple(
        Question(number, tuple(Picture(name, next(decks[name])) for name in shown[place]))
        for number, place in enumerate(order, start=1)
    )


def num_needed(contestants: Sequence[str], *, task: Task, num: int) -> dict[str, int]:
    """The most images of each contestant that a rater may be shown."""
    # Rounded up, since it is random which contestant gets the remainder.
    if task == "realness":
        each = _ceil(num // 2, len(contestants) - 1)
        return {name: num // 2 if name == REAL else each for name in contestants}
    others = len(contestants) - 1
    return dict.fromkeys(contestants, min(num, others * _ceil(num, others * (others + 1) // 2)))


def _single(contestants: Sequence[str], num: int, random: np.random.Generator) -> list[Names]:
    runs = [name for name in contestants if name != REAL]
    shown: list[Names] = [(REAL,)] * (num // 2)
    for name, share in zip(runs, _shares(num // 2, len(runs), random), strict=True):
        shown += [(name,)] * share
    return shown


def _pairs(contestants: Mapping[str, int], num: int, random: np.random.Generator) -> list[Names]:
    pairs = list(combinations(contestants, 2))
    # Sides alternate within and across pairs, so that a rater who always says "left" prefers
    # nobody.
    side = int(random.integers(2))
    shown: list[Names] = []
    for pair, share in zip(pairs, _shares(num, len(pairs), random), strict=True):
        for _ in range(share):
            shown.append(pair if side else pair[::-1])
            side = 1 - side
    return shown


def _shares(num: int, parts: int, random: np.random.Generator) -> list[int]:
    base, extra = divmod(num, parts)
    return [base + int(rank < extra) for rank in random.permutation(parts)]


def _ceil(num: int, parts: int) -> int:
    return -(-num // parts)
