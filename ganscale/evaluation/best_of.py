"""The best of several candidates by the discriminator: fewer failed images, less variety.

The logit of a GAN's discriminator estimates log p_data / p_generated, so that rejecting images by
it brings samples nearer to the data (discriminator rejection sampling, Azadi et al. 2019, arXiv
1810.06758). Their acceptance probability corrects the distribution, and needs calibrated logits.
Here, of N candidates the one with the highest logit is kept: it needs an order of images alone, and
goes further than a correction: with growing N it approaches the images that the discriminator likes
most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ganscale.errors import CheckpointError, ConfigError
from ganscale.evaluation.gan_metrics.gan_pairs import GanPair, ScoringDiscriminator, load_gan_pairs
from ganscale.generation.latent_sampler import LatentSampler
from ganscale.generation.sample_plan import PlannedImage
from ganscale.generation.sampler import SampleableGenerator
from ganscale.run_directory import containing_run

_ROWS = 64
"""The most images of a forward of the discriminator."""
_SAME = ("resolution", "img_channels", "num_classes")


@dataclass(frozen=True)
class BestImages:
    """The images that were kept."""

    images: Tensor
    """(n, C, H, W) of the generator's values."""
    seeds: list[int]
    logits: list[float]


def run_discriminator(path: Path, generator: SampleableGenerator) -> GanPair:
    """The newest checkpoint of the run that a snapshot belongs to, for its discriminator.

    Args:
        path: a run's folder, or a snapshot within one.
        generator: of the snapshot; the discriminator is moved to its device.

    Raises:
        ConfigError: the snapshot is in no run's folder, or of another model.
        CheckpointError: the run has no checkpoint that verifies, or trains no discriminator.
    """
    run_dir = containing_run(path)
    if run_dir is None:
        raise ConfigError(
            f"{path} is not in the folder of a run: candidates are judged by the discriminator, "
            "which checkpoints hold and snapshots do not. Give the run's folder, or a snapshot "
            "within it"
        )
    device = next(generator.model.parameters()).device
    (pair,) = load_gan_pairs([str(run_dir.root)], device=str(device))
    model = generator.info["model"]
    for name in _SAME:
        if pair.spec[name] != model[name]:
            raise ConfigError(
                f"{path} has model.{name}={model[name]}, the run in {run_dir.root} "
                f"{pair.spec[name]}: its discriminator cannot judge these images"
            )
    return replace(pair, discriminator=replace(pair.discriminator, values=generator.values))


def best_images(
    sampler: LatentSampler, discriminator: ScoringDiscriminator, plan: Sequence[PlannedImage]
) -> BestImages:
    """Draw all candidates of each planned image and keep the one with the highest logit.

    An image's candidates are judged together and by themselves, so that which one is kept depends
    on nothing else in the plan, also where a layer of the discriminator looks across its batch. Of
    equal logits the first seed's is kept. Raises `CheckpointError` if a logit is not finite.
    """
    images, seeds, logits = [], [], []
    # As many planned images at once as fill a forward of the generator.
    num_candidates = max(len(image.seeds) for image in plan)
    num_at_once = max(1, sampler.generator.forward_rows // num_candidates)
    for start in range(0, len(plan), num_at_once):
        part = plan[start : start + num_at_once]
        drawn = _drawn(sampler, part).split([len(image.seeds) for image in part])
        for image, candidates in zip(part, drawn, strict=True):
            by_candidate = _logits(discriminator, candidates, image.label).tolist()
            best = max(range(len(by_candidate)), key=by_candidate.__getitem__)
            images.append(candidates[best])
            seeds.append(image.seeds[best])
            logits.append(by_candidate[best])
    return BestImages(torch.stack(images), seeds, logits)


def _drawn(sampler: LatentSampler, plan: Sequence[PlannedImage]) -> Tensor:
    seeds = [seed for image in plan for seed in image.seeds]
    labels = [image.label for image in plan for _ in image.seeds if image.label is not None]
    return sampler.sample_seeds(seeds, label=labels or None)


def _logits(discriminator: ScoringDiscriminator, images: Tensor, label: int | None) -> Tensor:
    """One logit for each candidate, fp64 (n,)."""
    device = next(discriminator.model.parameters()).device
    num_rows = min(len(images), _ROWS)
    labels = None if label is None else torch.full((num_rows,), label, device=device)
    parts = []
    for start in range(0, len(images), num_rows):
        # The last forward is filled up with the first candidates: a minibatch deviation depends on
        # the number of images.
        rows = torch.arange(start, start + num_rows) % len(images)
        part = discriminator.logits(images[rows].to(device), labels)
        parts.append(part[: len(images) - start])
    logits = torch.cat(parts)
    if not logits.isfinite().all():
        raise CheckpointError("the run's discriminator gives logits that are not finite")
    return logits
