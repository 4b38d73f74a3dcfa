"""The networks' architectures: they take and return tensors and import only torch.

Adding one is a file, a line in `MODELS`, its section of the configuration, and a test. All have the
same call signatures: `generator(z, labels)` and `discriminator(images, labels)`, where labels are
None or ignored if the model knows no classes. One encoder, `encoder(images)`, serves all
generators.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ganscale.models.biggan import BigganDiscriminator, BigganGenerator
from ganscale.models.classifying import ClassifyingDiscriminator
from ganscale.models.dcgan import DcganDiscriminator, DcganGenerator
from ganscale.models.encoder import Encoder
from ganscale.models.joint import JointDiscriminator
from ganscale.models.r3gan import R3ganDiscriminator, R3ganGenerator
from ganscale.models.sndcgan import SndcganDiscriminator, SndcganGenerator
from ganscale.models.sngan import SnganDiscriminator, SnganGenerator
from ganscale.models.stylegan2 import Stylegan2Discriminator, Stylegan2Generator

__all__ = [
    "MODELS",
    "Architecture",
    "build_classifier",
    "build_discriminator",
    "build_encoder",
    "build_generator",
    "build_joint_discriminator",
]


Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Architecture:
    """How to build the generator and the discriminator of one kind."""

    generator: Callable[..., nn.Module]
    discriminator: Callable[..., nn.Module]


MODELS = {
    "biggan": Architecture(BigganGenerator, BigganDiscriminator),
    "dcgan": Architecture(DcganGenerator, DcganDiscriminator),
    "r3gan": Architecture(R3ganGenerator, R3ganDiscriminator),
    "sndcgan": Architecture(SndcganGenerator, SndcganDiscriminator),
    "sngan": Architecture(SnganGenerator, SnganDiscriminator),
    "stylegan2": Architecture(Stylegan2Generator, Stylegan2Discriminator),
}


def build_generator(spec: dict[str, Any]) -> nn.Module:
    """The generator that a config's `model` section (as a dictionary) describes."""
    return _build(MODELS[spec["name"]].generator, spec)


def build_discriminator(spec: dict[str, Any]) -> nn.Module:
    """The discriminator that a config's `model` section (as a dictionary) describes."""
    return _build(MODELS[spec["name"]].discriminator, spec)


def build_encoder(spec: dict[str, Any]) -> nn.Module:
    """An encoder into the latents of the generator that `spec` describes."""
    return _build(Encoder, spec)


def build_classifier(spec: dict[str, Any]) -> ClassifyingDiscriminator:
    """A discriminator that tells the `num_classes` classes of `spec` apart."""
    return _build(ClassifyingDiscriminator, spec)


def build_joint_discriminator(spec: dict[str, Any]) -> nn.Module:
    """A discriminator of pairs of the images and latents of the generator that `spec` describes."""
    return _build(JointDiscriminator, spec)


def _build(network: Callable[..., Network], spec: dict[str, Any]) -> Network:
    """Each network takes those options of its architecture that its constructor names."""
    # One description serves generator, discriminator and encoder, of which each knows some options.
    # A constructor that wants an option the description lacks fails by its name.
    return network(**{name: spec[name] for name in inspect.signature(network).parameters})
