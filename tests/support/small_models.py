"""Every architecture at its smallest, as sections of a configuration."""

from __future__ import annotations

from typing import Any

import torch

from ganscale.config import Config
from ganscale.generation.sampler import SampleableGenerator
from ganscale.models import build_generator

_COMMON = {"resolution": 16, "z_dim": 12}
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "dcgan": {**_COMMON, "name": "dcgan", "base_channels": 8},
    "sndcgan-classes": {**_COMMON, "name": "sndcgan", "base_channels": 4, "num_classes": 10},
    "sngan": {**_COMMON, "name": "sngan", "base_channels": 8},
    "sngan-classes": {**_COMMON, "name": "sngan", "base_channels": 8, "num_classes": 10},
    "biggan": {**_COMMON, "name": "biggan", "base_channels": 4, "num_classes": 10},
    "r3gan": {
        **_COMMON,
        "name": "r3gan",
        "base_channels": 16,
        "blocks_per_stage": 1,
        "num_classes": 10,
    },
    "stylegan2": {**_COMMON, "name": "stylegan2", "base_channels": 8, "residual": True},
    "stylegan2-classes": {**_COMMON, "name": "stylegan2", "base_channels": 8, "num_classes": 10},
}


def small_generator(name: str, *, seed: int = 0) -> SampleableGenerator:
    """A generator of `SMALL_MODELS` with random weights, as if after 5,000 images."""
    spec = Config().with_changes({"model": SMALL_MODELS[name]}).model.model_dump()
    torch.manual_seed(seed)
    info = {"model": spec, "nimg": 5000, "classes": []}
    return SampleableGenerator(build_generator(spec), spec=spec, info=info)
