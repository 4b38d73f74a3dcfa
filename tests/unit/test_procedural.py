"""The procedural set is the same everywhere and has structure."""

from __future__ import annotations

import hashlib

import numpy as np

from ganscale.data.procedural import CLASSES, procedural_image


def test_pictures_are_functions_of_split_and_index() -> None:
    first, label = procedural_image("train", 123)
    again, _ = procedural_image("train", 123)
    other, _ = procedural_image("test", 123)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert label == 3


def test_pictures_are_distinct_and_every_class_has_contrast() -> None:
    pictures = [procedural_image("train", i)[0] for i in range(500)]
    assert len({hashlib.sha256(p.tobytes()).hexdigest() for p in pictures}) == 500
    for label in range(len(CLASSES)):
        spread = np.mean([pictures[i].std() for i in range(label, 500, 10)])
        assert spread > 15, CLASSES[label]
