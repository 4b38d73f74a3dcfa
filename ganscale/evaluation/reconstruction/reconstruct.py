"""Reconstructions of degraded images by a trained generator, and their similarity to the originals.

All ranks share the images in whole groups of `GROUP`, which are inverted together, so the results
are bit-identical for any number of ranks.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from ganscale.data.values import PIXELS
from ganscale.errors import ConfigError, DataError
from ganscale.evaluation.distributions.nearest import features_of
from ganscale.evaluation.image_sets import ImageSet, Indices
from ganscale.evaluation.image_views import with_classes_of
from ganscale.generation.degradations import Degradation
from ganscale.generation.inversion import GROUP, InversionResult, InversionSettings, encode, invert
from ganscale.generation.sampler import SampleableGenerator, to_uint8
from ganscale.generation.snapshot import load_encoder, load_generator
from ganscale.metrics.extractors import EfficientNetLite0, FeatureExtractor
from ganscale.metrics.similarity import feature_distance, perceptual_distance, psnr, ssim
from ganscale.world import World

ReconstructionMethod = Literal["inversion", "encoder"]


@dataclass(frozen=True)
class Reconstructor:
    """A trained generator and a method to find the latents of images."""

    generator: SampleableGenerator
    encoder: nn.Module | None
    """Gives an inversion its last start, or the latents themselves if `by` is "encoder"."""
    by: ReconstructionMethod = "inversion"
    search: InversionSettings = InversionSettings()

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        by: ReconstructionMethod | None = None,
        search: InversionSettings,
        device: str = "cpu",
    ) -> Reconstructor:
        """Load a snapshot, or a run's newest one; `by` is by default its encoder if it has one.

        Raises `ConfigError` if an encoder is asked for where there is none, or the generator makes
        arrays of floats.
        """
        generator, encoder = load_generator(path, device=device), load_encoder(path, device=device)
        if generator.values != PIXELS:
            raise ConfigError(f"{path} makes arrays of floats: only images are reconstructed")
        if by == "encoder" and encoder is None:
            raise ConfigError(
                f"{path} has no encoder: reconstruct by inversion, or train one for it "
                "(ganscale train --config encoder-cifar10 "
                f"{shlex.quote(f'method.generator={path}')})"
            )
        # An encoder takes one forward for an image, an inversion hundreds.
        return cls(generator, encoder, by or ("encoder" if encoder else "inversion"), search)

    def num_steps(self, num_images: int) -> int:
        """The sum of all numbers that `reconstruct` calls its progress with."""
        if self.by == "encoder":
            return num_images
        return self.search.num_steps(num_images)

    def __call__(
        self,
        degradation: Degradation,
        observed: Tensor,
        labels: Tensor | None,
        progress: Callable[[int], None],
    ) -> InversionResult:
        """Latents and images of what was observed, (n, ...)."""
        if self.by == "encoder":
            assert self.encoder is not None
            progress(len(observed))
            return encode(self.generator, self.encoder, degradation, observed, labels=labels)
        return invert(
            self.generator,
            degradation,
            observed,
            self.search,
            encoder=self.encoder,
            labels=labels,
            progress=progress,
        )


@dataclass(frozen=True)
class Reconstructions:
    """The reconstructions of images, uint8 (n, C, H, W) each, on the CPU."""

    truth: Tensor
    inputs: Tensor
    """What was observed of them, filled up to images."""
    trivial: Tensor
    """The trivial reconstructions."""
    images: Tensor
    latents: Tensor
    """(n, z_dim)"""


def reconstruct(
    reconstructor: Reconstructor,
    images: ImageSet,
    degradation: Degradation,
    world: World,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda steps: None,
) -> Reconstructions | None:
    """Degrade and reconstruct all images; the result on rank 0, None on others.

    Every rank calls this inside a process group. Raises `DataError` if the images are not of the
    generator's size or one cannot be read, on all ranks alike.
    """
    _check_shape(images, reconstructor.generator)
    mine: list[tuple[int, list[Tensor]]] = []
    problem = ""
    try:
        for group in range(world.rank, -(-len(images) // GROUP), world.world_size):
            rows = np.arange(group * GROUP, min((group + 1) * GROUP, len(images)))
            tensors = _reconstruct_rows(reconstructor, images, rows, degradation, seed, progress)
            # Results leave the GPU group by group, so its memory does not limit the number of
            # images.
            mine.append((group, [tensor.cpu() for tensor in tensors]))
    except DataError as error:
        problem = str(error)
    # A rank that raised alone would leave the others in the gather for ever.
    problems = [""] * world.world_size
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise DataError(next(text for text in problems if text))
    gathered: list[list[tuple[int, list[Tensor]]]] = [[] for _ in range(world.world_size)]
    dist.gather_object(mine, gathered if world.is_main else None, dst=0)
    if not world.is_main:
        return None
    # In the order of the images again, whichever rank had them.
    parts = [tensors for _, tensors in sorted(sum(gathered, []), key=lambda part: part[0])]
    return Reconstructions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def labels_for(generator: SampleableGenerator, images: ImageSet, rows: Indices) -> Tensor | None:
    """Labels of some images as the generator counts its classes, matched by name.

    None where images or generator have no labels: an inversion then chooses labels with its starts.
    Raises `DataError` for images of classes that the generator lacks.
    """
    if not generator.num_classes or images.labels is None:
        return None
    labels = with_classes_of(images, generator.classes, "the generator").labels
    assert labels is not None
    return torch.from_numpy(labels[rows])


def _reconstruct_rows(
    reconstructor: Reconstructor,
    images: ImageSet,
    rows: Indices,
    degradation: Degradation,
    seed: int,
    progress: Callable[[int], None],
) -> tuple[Tensor, ...]:
    """The fields of `Reconstructions` for some of the images."""
    generator = reconstructor.generator
    device = next(generator.model.parameters()).device
    truth = images.read(rows)
    scaled = truth.to(device).float() / 127.5 - 1
    # The noise of an image depends on its number in the set and not on its group or rank.
    observed = degradation.observe(scaled, rows.tolist(), seed=seed)
    labels = labels_for(generator, images, rows)
    labels = None if labels is None else labels.to(device)
    inverted = reconstructor(degradation, observed, labels, progress)
    # Pixels that are known are put back before similarity is measured, as anyone would use them.
    completed = degradation.completed(inverted.images, observed)
    inputs, trivial = degradation.fill(observed), degradation.baseline(observed)
    return truth, to_uint8(inputs), to_uint8(trivial), to_uint8(completed), inverted.latents


def similarity(
    images: Tensor, truth: Tensor, extractor: FeatureExtractor, network: EfficientNetLite0
) -> dict[str, Tensor]:
    """The similarity of pairs of uint8 (n, C, H, W), each measure fp64 (n,), on the CPU.

    The perceptual distance is of `network`'s activations, the feature distance of the
    `extractor`'s features; only gray and RGB images have them. Equal images count as 100 dB.
    """
    # One pair of equal images would make the mean PSNR infinite.
    measures = {"psnr": psnr(images, truth).clamp(max=100.0), "ssim": ssim(images, truth)}
    if images.shape[1] in (1, 3):
        features = [features_of(part, extractor) for part in (images, truth)]
        measures[f"perceptual{network.suffix}"] = perceptual_distance(images, truth, network)
        measures[f"feature{extractor.suffix}"] = feature_distance(*features)
    return measures


def _check_shape(images: ImageSet, generator: SampleableGenerator) -> None:
    model = generator.info["model"]
    wanted = (model["img_channels"], model["resolution"], model["resolution"])
    if tuple(images.shape) != wanted:
        channels, height, width = images.shape
        raise DataError(
            f"{images.description} are {width}x{height} with {channels} channels, the generator's "
            f"{wanted[2]}x{wanted[1]} with {wanted[0]}: ganscale shards build --resolution "
            f"{wanted[1]} --img-channels {wanted[0]} converts a folder of images"
        )
