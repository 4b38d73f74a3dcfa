"""The players' architectures: they take and return tensors and import only torch.

Adding one is a file, a line in `MODELS` and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ganscale.models.dcgan import DcganDiscriminator, DcganGenerator

__all__ = ["MODELS", "Architecture", "build_discriminator", "build_generator"]


@dataclass(frozen=True)
class Architecture:
    """How to build the two players of one kind."""

    generator: Callable[..., nn.Module]
    discriminator: Callable[..., nn.Module]


MODELS = {
    "dcgan": Architecture(DcganGenerator, DcganDiscriminator),
}


def build_generator(spec: dict[str, Any]) -> nn.Module:
    """The generator that a config's `model` section (as a dictionary) describes."""
    options = {k: v for k, v in spec.items() if k != "name"}
    return MODELS[spec["name"]].generator(**options)


def build_discriminator(spec: dict[str, Any]) -> nn.Module:
    """The discriminator that a config's `model` section (as a dictionary) describes."""
    options = {k: v for k, v in spec.items() if k not in ("name", "z_dim")}
    return MODELS[spec["name"]].discriminator(**options)
