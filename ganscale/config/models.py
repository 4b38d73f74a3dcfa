"""The architectures and their options; each has its own fields and the published defaults."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ganscale.config.section import Section, by_name


class _ModelSection(Section):
    # What the rest of the configuration has to know of an architecture, which states what differs
    # from these: no labels, no bound, and nothing that looks across a batch.
    takes_labels: ClassVar[bool] = False
    """Whether its networks use labels; otherwise classes are refused instead of being ignored."""
    is_lipschitz: ClassVar[bool] = False
    """Whether the slope of its discriminator is bounded by construction, as by spectral norm."""
    has_batch_statistics: ClassVar[bool] = False
    """Whether it has batch norm, or spectral norm, which takes a step at each forward. Both are
    changed by a forward of a part of the batch."""
    has_minibatch_std: ClassVar[bool] = False
    """Whether its discriminator looks at the deviation between the images of a batch."""

    resolution: int = Field(32, ge=16, le=256)
    """Height and width of the images in pixels, a power of two."""
    img_channels: Literal[1, 3, 4] = 3
    """Channels of the images: gray, RGB or RGBA."""
    num_classes: int = Field(0, ge=0)
    """Number of classes whose labels both networks are given; 0 trains without labels."""

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        if self.resolution & (self.resolution - 1):
            raise ValueError(f"model.resolution must be a power of two, got {self.resolution}")
        return self


SHARED_FIELDS = tuple(_ModelSection.model_fields)
"""Fields that say what the images are; they mean the same for every architecture."""


class DcganModel(_ModelSection):
    """Radford et al. 2016: strided convolutions and batch norm."""

    has_batch_statistics: ClassVar[bool] = True

    name: Literal["dcgan"] = "dcgan"
    """Architecture."""
    z_dim: int = Field(100, ge=1)
    """Size of the latent."""
    base_channels: int = Field(64, ge=1)
    """Width next to the image; it doubles with every halving of the resolution."""


class SndcganModel(_ModelSection):
    """Miyato et al. 2018: strided convolutions, spectral norm, projection."""

    takes_labels: ClassVar[bool] = True
    is_lipschitz: ClassVar[bool] = True
    has_batch_statistics: ClassVar[bool] = True

    name: Literal["sndcgan"] = "sndcgan"
    z_dim: int = Field(128, ge=1)
    base_channels: int = Field(64, ge=1)
    """Width next to the image; it doubles with every halving of the resolution, up to 8 times."""


class SnganModel(_ModelSection):
    """Miyato et al. 2018: residual, spectral norm, projection."""

    takes_labels: ClassVar[bool] = True
    is_lipschitz: ClassVar[bool] = True
    has_batch_statistics: ClassVar[bool] = True

    name: Literal["sngan"] = "sngan"
    z_dim: int = Field(128, ge=1)
    base_channels: int = Field(128, ge=1)
    """Width of the discriminator up to 32x32; the generator's is twice that."""


class BigganModel(_ModelSection):
    """Brock et al. 2019, CIFAR form: shared class embedding, split latent, self-attention."""

    takes_labels: ClassVar[bool] = True
    is_lipschitz: ClassVar[bool] = True
    has_batch_statistics: ClassVar[bool] = True

    name: Literal["biggan"] = "biggan"
    num_classes: int = Field(10, ge=1)
    z_dim: int = Field(80, ge=1)
    base_channels: int = Field(96, ge=1)
    """Half the discriminator's and a quarter of the generator's width up to 32x32."""


class R3ganModel(_ModelSection):
    """Huang et al. 2024, configuration E: inverted residual bottlenecks, no norms."""

    takes_labels: ClassVar[bool] = True

    name: Literal["r3gan"] = "r3gan"
    z_dim: int = Field(64, ge=1)
    base_channels: int = Field(768, ge=16, multiple_of=8)
    """Width of all stages up to 32x32; blocks are twice as wide inside, in groups of 16."""
    blocks_per_stage: int = Field(2, ge=1)
    """Residual blocks at each resolution."""


class Stylegan2Model(_ModelSection):
    """Karras et al. 2020: mapping network, modulated convolutions, skips."""

    takes_labels: ClassVar[bool] = True
    has_minibatch_std: ClassVar[bool] = True

    name: Literal["stylegan2"] = "stylegan2"
    z_dim: int = Field(512, ge=1)
    base_channels: int = Field(512, ge=1)
    """Largest width; above 32x32 it halves with every doubling."""
    mapping_layers: int = Field(2, ge=1)
    """Layers from latent to style."""
    residual: bool = False
    """Residual blocks in the discriminator; the CIFAR form has none."""


ModelConfig = Annotated[
    DcganModel | SnganModel | SndcganModel | BigganModel | R3ganModel | Stylegan2Model,
    Field(discriminator="name"),
    by_name("dcgan"),
]
"""One of the architectures, chosen by its `name`."""
