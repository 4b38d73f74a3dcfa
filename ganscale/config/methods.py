"""The training methods and their options: which networks learn, and from which losses.

A union of sections, chosen by `name`: a field that belongs to another method is refused as unknown,
instead of being set without effect.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ganscale.config.section import Section, by_name


class GanMethod(Section):
    """Goodfellow et al. 2014: a generator against a discriminator."""

    name: Literal["gan"] = "gan"
    """Training method."""


class VaeMethod(Section):
    """Kingma and Welling 2014: an encoder and the generator maximise a bound on the likelihood."""

    name: Literal["vae"] = "vae"
    beta: float = Field(1.0, ge=0)
    """Weight of the divergence of the posterior from the prior; 1 is the bound itself."""


class VaeGanMethod(Section):
    """Larsen et al. 2016: a VAE that compares images by the features of a discriminator."""

    name: Literal["vae-gan"] = "vae-gan"
    beta: float = Field(1.0, ge=0)
    adversarial: float = Field(0.1, ge=0)
    """Weight of the adversarial loss, beside a likelihood in nats per dimension."""


class EncoderMethod(Section):
    """Zhu et al. 2020: an encoder into the latents of a generator that is trained already."""

    name: Literal["encoder"] = "encoder"
    generator: str = Field(min_length=1)
    """Snapshot, or folder of a run, whose generator it is."""
    adversarial: float = Field(0.1, ge=0)


class SemiSupervisedMethod(Section):
    """Salimans et al. 2016: the discriminator also learns the classes, from a few labels."""

    name: Literal["semi-supervised"] = "semi-supervised"
    labels: int = Field(4000, ge=1)
    """Number of images whose labels are used, equally many of each class; the seed chooses them."""
    adversarial: float = Field(1.0, ge=0)
    """Weight of the adversarial loss beside the cross-entropy; 0 learns from the labels alone."""


class BiganMethod(Section):
    """Donahue et al. 2017, Dumoulin et al. 2017: a discriminator of pairs of image and latent."""

    name: Literal["bigan"] = "bigan"


MethodConfig = Annotated[
    GanMethod | VaeMethod | VaeGanMethod | EncoderMethod | BiganMethod | SemiSupervisedMethod,
    Field(discriminator="name"),
    by_name("gan"),
]
"""One of the methods, chosen by its `name`."""
