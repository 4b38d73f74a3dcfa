"""The averaged generator of a run and its discriminator, from one checkpoint, for tournaments.

A discriminator scores images in evaluation mode, in batches of a fixed number of images of one
origin, as in training: batch norm uses its running statistics, and a minibatch standard deviation
is always that of equally many images. Batch statistics were tried instead: they order snapshots
more clearly, but make logits depend on the images beside (benchmarks/EVALUATION.md).

The meaning of a logit depends on the objective: with a cross-entropy it is a log probability ratio,
a Wasserstein critic has no zero, and a relativistic one is defined up to a constant. So each
discriminator has a `threshold`, from real images and samples of its own run's generator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ganscale.checkpoint import CheckpointStore, SavedFiles
from ganscale.config import load_config
from ganscale.data.shards import ShardSet
from ganscale.data.values import PIXELS, ValueRange
from ganscale.errors import CheckpointError, DataError
from ganscale.evaluation.image_sets import ImageSet
from ganscale.evaluation.run_references import RunReference, due_by, shards_of_run
from ganscale.generation.sampler import SampleableGenerator
from ganscale.generation.snapshot import load_generator
from ganscale.models import build_discriminator, build_generator
from ganscale.run_directory import RunDirectory

# Images of a batch; a minibatch standard deviation depends on it.
_ROWS = 64

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ScoringDiscriminator:
    """A discriminator in evaluation mode; images that look more real have higher logits."""

    model: nn.Module
    num_classes: int = 0
    values: ValueRange = PIXELS
    """What the values of images mean."""

    @torch.no_grad()
    def logits(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """One logit for each image, fp64 (N,), on the CPU.

        A conditional discriminator gives an image without a label the highest of its logits over
        all classes.

        Args:
            images: stored values, (N, C, H, W), on the discriminator's device.
            labels: int64 (N,); None where they are not known.
        """
        scaled = self.values.to_network(images)
        if labels is not None or not self.num_classes:
            return self._logits(scaled, labels)
        # Real and generated images get the same treatment. Any one label would be wrong for most
        # images of both, and their logits would say little.
        first = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        by_class = [self._logits(scaled, first + c) for c in range(self.num_classes)]
        return torch.stack(by_class).amax(0)

    def _logits(self, scaled: Tensor, labels: Tensor | None) -> Tensor:
        logits: Tensor = self.model(scaled, labels)
        return logits.double().cpu()


@dataclass(frozen=True, eq=False)
class GanPair:
    """The generator and the discriminator of a run, from one checkpoint."""

    name: str
    nimg: int
    generator: SampleableGenerator
    discriminator: ScoringDiscriminator
    identity: str
    """A digest of the checkpoint, which is different for different weights."""
    spec: dict[str, Any]
    """The `model` section that both were built from."""


def load_gan_pairs(texts: Sequence[str], *, device: str = "cpu") -> list[GanPair]:
    """Load the generators and discriminators of runs, each from a checkpoint that verifies.

    Args:
        texts: for each run its folder, which stands for the newest checkpoint, or RUN@KIMG, which
            stands for the newest checkpoint that was due by that many thousand images. Checkpoints
            are read from where the run's configuration says.
        device: the device to move the networks to.

    Pairs are named by the run's name and position, or by its path where names would be equal.
    Raises `CheckpointError` when there is no such checkpoint, or it cannot be read.
    """
    pairs = [_load(text, device) for text in texts]
    names = Counter(pair.name for pair in pairs)
    return [
        replace(pair, name=f"{RunReference.parse(text).path}@{pair.nimg / 1000:g}")
        if names[pair.name] > 1
        else pair
        for text, pair in zip(texts, pairs, strict=True)
    ]


def threshold(real_logits: Floats, fake_logits: Floats) -> float:
    """The logit at which a discriminator errs equally often on real images and on fakes.

    Both are (n,), of equally many images.
    """
    # As many real logits lie below the median of all as fake logits lie above it.
    return float(np.median(np.concatenate([real_logits, fake_logits])))


def _load(text: str, device: str) -> GanPair:
    reference = RunReference.parse(text)
    root, kimg = reference.path, reference.kimg
    run_dir = RunDirectory(root)
    if not run_dir.config.is_file():
        raise CheckpointError(
            f"{text} is not a run: it has no {run_dir.config.name}. Expected the folder of a run, "
            "or RUN@KIMG: discriminators are in checkpoints, and not in snapshots"
        )
    # A run's folder may have been moved or copied since, so the place in its configuration is not
    # used; checkpoints in another store are read from there.
    config = load_config(run_dir.config).with_changes(
        {"storage": str(root.parent), "name": root.name}
    )
    store = CheckpointStore(config.checkpoints)
    files = store.newest(up_to=None if kimg is None else due_by(kimg, config))
    if files is None:
        there = ", ".join(f"{name.nimg / 1000:g}" for name in sorted(store.lineage()))
        raise CheckpointError(
            f"no checkpoint of {text} that verifies in {store.location}; it has "
            + (f"some at {there} kimg" if there else "none")
        )
    # Runs of some methods have no discriminator in their state, and a changed model other tensors.
    try:
        return _gan_pair(run_dir, files, device)
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{store.where(files.name)} does not hold the generator and discriminator of its "
            f"configuration: {reason}"
        ) from None


def score_images(
    discriminators: Sequence[ScoringDiscriminator],
    images: ImageSet,
    *,
    use_labels: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> Floats:
    """Every discriminator's logits of every image, (D, N).

    Images are read once for all discriminators. `progress` is called with the number of images
    done.
    """
    device = next(discriminators[0].model.parameters()).device
    labels = torch.from_numpy(images.labels) if use_labels and images.labels is not None else None
    logits = np.empty((len(discriminators), len(images)))
    for start in range(0, len(images), _ROWS):
        # The last batch is filled up with the first images, so that minibatch statistics are of
        # equally many images throughout.
        rows = np.arange(start, start + _ROWS) % len(images)
        batch = images.read(rows).to(device)
        batch_labels = None if labels is None else labels[rows].to(device)
        count = min(_ROWS, len(images) - start)
        for discriminator, row in zip(discriminators, logits, strict=True):
            row[start : start + count] = discriminator.logits(batch, batch_labels)[:count].numpy()
        progress(count)
    return logits


def _gan_pair(run_dir: RunDirectory, files: SavedFiles, device: str) -> GanPair:
    """Raises `KeyError`, `TypeError` or `RuntimeError` if the state is not that of its models."""
    spec: dict[str, Any] = files.meta["config"]["model"]
    state, nimg = files.state(), files.name.nimg
    generator, discriminator = build_generator(spec), build_discriminator(spec)
    generator.load_state_dict(state["averages"][""]["generator"])
    discriminator.load_state_dict(state["D"]["model"])
    discriminator.to(device).eval().requires_grad_(False)
    return GanPair(
        name=f"{run_dir.name}@{nimg / 1000:g}",
        nimg=nimg,
        generator=SampleableGenerator(
            generator.to(device),
            spec=spec,
            info={"nimg": nimg, **_classes(run_dir)},
        ),
        discriminator=ScoringDiscriminator(discriminator, num_classes=spec["num_classes"]),
        identity=files.meta["tensors_sha256"],
        spec=spec,
    )


def _classes(run_dir: RunDirectory) -> dict[str, Any]:
    """Names and sizes of the classes of the set that a run was trained on, as in snapshots.

    Nothing where neither the set nor a snapshot is there.
    """
    if (shards := shards_of_run(run_dir)) is not None:
        with suppress(DataError):
            shard_set = ShardSet.load(shards)
            return {"classes": shard_set.classes, "class_counts": shard_set.class_counts}
    # The shards are elsewhere, which a tournament can do without: snapshots know the classes too.
    with suppress(CheckpointError):
        generator = load_generator(run_dir.root)
        return {"classes": generator.classes, "class_counts": generator.class_counts}
    return {}
