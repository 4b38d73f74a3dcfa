"""Make a file of statistics that ships with the package, from the images themselves.

    python -m benchmarks.reference_statistics cifar10 --split train \
        --name "CIFAR-10's training images" \
        --out ganscale/evaluation/distributions/statistics/cifar10_train_inception.safetensors

Extracts the features of all images, 50,000 of which take 15 s on a GPU and about an hour and a half
on one CPU core; torchrun shares the work among processes. With `--compare` nothing is written: the
result is compared with a file that exists. Features differ between kinds of machines by about 1e-5.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ganscale.evaluation.distributions.features import extract_reference
from ganscale.evaluation.distributions.precomputed import PrecomputedStatistics, content_digest
from ganscale.evaluation.image_sets import open_images
from ganscale.metrics.extractors import open_extractor
from ganscale.metrics.fid import frechet_distance
from ganscale.tracking.console import progress_bars, stderr_console
from ganscale.world import World, process_group


def main() -> None:
    """Write the file, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", help="a folder, archive, shard set, or cifar10")
    parser.add_argument("--split", default="train", choices=["train", "test"])
    parser.add_argument("--name", required=True, help="what the images are, for people")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--extractor", default="inception-v3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compare", action="store_true", help="with the file at --out")
    given = parser.parse_args()
    world, extractor = World.detect(given.device), open_extractor(given.extractor)
    extractor.to(world.device)
    images = open_images(given.source, split=given.split)
    with (
        process_group(world),
        progress_bars(stderr_console() if world.is_main else None) as start_task,
    ):
        content = content_digest(images, world, progress=start_task("content", len(images)))
        progress = start_task(images.description, len(images))
        features = extract_reference(images, extractor, world, progress=progress)
    if features is None:
        return
    statistics = PrecomputedStatistics(
        path=given.out,
        name=given.name,
        extractor_digest=extractor.digest,
        content_digest=content,
        count=len(images),
        shape=images.shape,
    )
    if not given.compare:
        statistics.save(features.moments)
        print(f"wrote {given.out}")
        return
    known = PrecomputedStatistics.load(given.out)
    if known != statistics:
        sys.exit(f"{given.out} is of other images or another extractor: {known}, not {statistics}")
    moments = known.moments()
    print(f"Frechet distance  {frechet_distance(features.moments, moments):.3g}")
    for name, ours, theirs in (
        ("mean", features.moments.mean, moments.mean),
        ("covariance", features.moments.covariance, moments.covariance),
    ):
        print(f"{name:16}  differs by at most {(ours - theirs).abs().max():.3g}")


if __name__ == "__main__":
    main()
