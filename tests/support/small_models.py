"""Every architecture at its smallest, as sections of a configuration."""

from __future__ import annotations

from typing import Any

__all__ = ["SMALL_MODELS"]

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
