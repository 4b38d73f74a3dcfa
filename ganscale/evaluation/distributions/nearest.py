"""The reference images nearest to given ones, by features and by pixels, which shows copies.

A distance alone does not say whether an image is a copy, so the typical distance of a reference
image to the nearest other one is measured with it. The reference is read once, block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ganscale.errors import DataError
from ganscale.evaluation.image_sets import ImageSet, Indices
from ganscale.metrics.extractors import FeatureExtractor, as_rgb

# Pixels of a block of 32x32 RGB images are 12 MiB in float32.
_BLOCK = 1000
_GROUP = 50
_NUM_PROBES = 256


@dataclass(frozen=True)
class Nearest:
    """The k nearest reference images of each sample."""

    distances: Tensor
    """(n, k), Euclidean, ascending."""
    indices: Tensor
    """(n, k), int64: rows of the reference."""
    typical: float
    """Median distance of some reference images to the nearest other one."""


def probe_indices(num_reference: int) -> Indices:
    """The reference images, at most 256, whose own distances say what is typical."""
    # A fixed seed: what is typical of a reference does not depend on the samples it is compared to.
    return np.sort(np.random.default_rng(0).permutation(num_reference)[:_NUM_PROBES])


def features_of(images: Tensor, extractor: FeatureExtractor) -> Tensor:
    """Features of a few images, uint8 (n, C, H, W): float32, (n, d), on the CPU."""
    parts = [extractor.features(as_rgb(part)).float().cpu() for part in images.split(_GROUP)]
    return torch.cat(parts)


def nearest_in_features(samples: Tensor, reference: Tensor, k: int) -> Nearest:
    """The k nearest by features (n, d) and (m, d). Raises `DataError` if m is not above k."""
    return _nearest(samples, len(reference), k, lambda rows: reference[torch.from_numpy(rows)])


def nearest_in_pixels(
    samples: Tensor,
    reference: ImageSet,
    k: int,
    *,
    progress: Callable[[int], None] = lambda num_images: None,
) -> Nearest:
    """The k nearest by root mean square differences of pixels, 0 to 255, of uint8 (n, C, H, W).

    Raises `DataError` if the reference has images of another shape, or not more than k.
    """
    if samples.shape[1:] != torch.Size(reference.shape):
        shape = tuple(samples.shape[1:])
        raise DataError(
            f"{reference.description} have shape {reference.shape}, the generated ones {shape}"
        )

    def read(rows: Indices) -> Tensor:
        progress(len(rows))
        return _scaled(reference.read(rows))

    return _nearest(_scaled(samples), len(reference), k, read)


def _scaled(images: Tensor) -> Tensor:
    """Pixels (n, C H W), scaled so that Euclidean distances are root mean square differences."""
    return images.flatten(1).float().div(images[0].numel() ** 0.5)


def _nearest(
    samples: Tensor, num_reference: int, k: int, read: Callable[[Indices], Tensor]
) -> Nearest:
    if num_reference <= k:
        raise DataError(f"{num_reference} reference images are too few for {k} nearest ones")
    probes = probe_indices(num_reference)
    queries = torch.cat([samples, read(probes)])
    distances = queries.new_full((len(queries), k), torch.inf)
    indices = torch.zeros(len(queries), k, dtype=torch.int64)
    own = torch.from_numpy(probes)
    for start in range(0, num_reference, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, num_reference))
        # By differences and not by products, whose rounding could hide that a distance is 0: an
        # exact copy is what this is for.
        to_rows = torch.cdist(queries, read(rows), compute_mode="donot_use_mm_for_euclid_dist")
        inside = (own >= start) & (own < start + _BLOCK)
        # The probes are reference images; none is its own nearest neighbour.
        to_rows[len(samples) :][inside, own[inside] - start] = torch.inf
        # The best k so far compete with this block, so memory does not grow with the reference.
        candidates = torch.cat([distances, to_rows], 1)
        numbers = torch.cat([indices, torch.from_numpy(rows).expand(len(queries), -1)], 1)
        distances, places = candidates.topk(k, largest=False)
        indices = numbers.gather(1, places)
    typical = float(distances[len(samples) :, 0].median())
    return Nearest(distances[: len(samples)], indices[: len(samples)], typical)
