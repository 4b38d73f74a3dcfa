"""Differentiable augmentation of the images a discriminator sees."""

from __future__ import annotations

from ganscale.augment.draws import Draws
from ganscale.augment.pipeline import AUGMENTATIONS, Augmentation

__all__ = ["AUGMENTATIONS", "Augmentation", "Draws"]
