"""Which of a run's averages of the generator is best: a choice that is made after training.

How far back an average should reach is not known beforehand, and costs one more copy of the weights
(`training.extra_ema_halflives_kimg`), not one more run (compare Karras et al. 2024, arXiv
2312.02696, section 3). All averages of a position draw the images of the same seeds, so that their
distances are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ganscale.errors import DataError
from ganscale.evaluation.distributions.evaluate import Workload, column_of
from ganscale.evaluation.distributions.features import (
    FeatureCache,
    StartTask,
    extract,
    plan_reference,
)
from ganscale.evaluation.image_sets import GeneratedImages, ImageSet
from ganscale.metrics.extractors import FeatureExtractor
from ganscale.metrics.fid import frechet_jackknife
from ganscale.metrics.intervals import Estimate, jackknife
from ganscale.metrics.statistics import Moments
from ganscale.world import World

__all__ = ["AverageResult", "AveragesComparison", "compare_averages"]


@dataclass(frozen=True)
class AverageResult:
    """One average of the generator."""

    name: str
    """As its folder among the snapshots is called; "" is the main one."""
    snapshot: str
    distance: Estimate | None
    """The Frechet distance; None if it could not be computed."""
    above_best: Estimate | None
    """This distance minus that of the best average, with the interval of the pairs."""
    problem: str = ""
    """Why there is no distance."""


@dataclass(frozen=True)
class AveragesComparison:
    """All averages of one position against one reference."""

    metric: str
    """`fid`, or `fd_...` of another extractor."""
    results: tuple[AverageResult, ...]
    protocol: Mapping[str, Any]

    @property
    def best(self) -> AverageResult:
        """The average with the lowest distance."""
        measured = [result for result in self.results if result.distance is not None]
        return min(measured, key=lambda result: result.distance.value if result.distance else 0)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are written to files."""
        return {
            "metric": self.metric,
            "best": self.best.name or "main",
            "averages": [asdict(result) for result in self.results],
            "protocol": dict(self.protocol),
        }


def compare_averages(
    snapshots: Mapping[str, Path],
    reference: ImageSet,
    extractor: FeatureExtractor,
    world: World,
    *,
    num_images: int,
    seed: int = 0,
    cache: FeatureCache | None = None,
    planned: Callable[[Workload], None] = lambda workload: None,
    start_task: StartTask = lambda what, total: lambda num: None,
) -> AveragesComparison | None:
    """Measure all averages with images of the same seeds; on rank 0, None on other ranks.

    Args:
        snapshots: files by the names of the averages.
        reference: real images, more than the extractor has features.
        extractor: of the features.
        world: of the process group; all its ranks share the work.
        num_images: drawn from each average.
        seed: of the first image.
        cache: keeps the reference's features, and resumes an interrupted pass over samples.
        planned: called on every rank when it is known how many images will be extracted.
        start_task: called with each part and its number of images; what it returns is called with
            progress.

    Raises:
        DataError: the reference has too few images, or of another shape; no average has a distance.
    """
    # Before any features are extracted, which may take long.
    if len(reference) <= extractor.num_features:
        raise DataError(
            f"{reference.description}: too few for the {extractor.num_features} features of "
            f"{extractor.name}, as a Frechet distance needs more images than features: measure the "
            "snapshots of the averages one by one, ganscale evaluate --snapshot FILE --metrics kid "
            "from 1,000 images on, prdc with fewer"
        )
    cache = cache or FeatureCache()
    plan = plan_reference(
        reference, extractor, world, num_rows=0, cache=cache, start_task=start_task
    )
    statistics = "" if plan.statistics is None else plan.statistics.name
    planned(Workload(num_images * len(snapshots), plan.num_missing, statistics))
    of_reference = plan.features(extractor, world, cache=cache, start_task=start_task)
    rows: dict[str, Tensor] = {}
    for name, path in snapshots.items():
        samples = GeneratedImages.of_snapshot(path, num_images, seed=seed, device=world.device)
        if samples.shape != reference.shape:
            raise DataError(
                f"{samples.description} have shape {samples.shape}, {reference.description} "
                f"{reference.shape}: only images of one shape can be compared"
            )
        progress = start_task(samples.description, num_images)
        features = extract(samples, extractor, world, progress=progress)
        if features is not None:
            rows[name] = features.rows
    if of_reference is None:
        return None
    return AveragesComparison(
        column_of("fid", extractor),
        _results(snapshots, rows, of_reference.moments),
        {
            "extractor": extractor.name,
            "extractor_digest": extractor.digest,
            "resizer": extractor.resizer,
            "num_samples": num_images,
            "seed": seed,
            "reference": reference.description,
            "reference_digest": reference.digest,
            "num_reference": len(reference),
            "reference_statistics": statistics or "extracted",
        },
    )


def _results(
    snapshots: Mapping[str, Path], rows: Mapping[str, Tensor], reference: Moments
) -> tuple[AverageResult, ...]:
    """The distance of each average and how far it is above the lowest one."""
    measured: dict[str, tuple[float, list[float]]] = {}
    problems: dict[str, str] = {}
    for name, features in rows.items():
        # An average that reaches back to the initial weights may draw one image only; that says
        # nothing about the others.
        try:
            measured[name] = frechet_jackknife(features, reference)
        except DataError as error:
            problems[name] = str(error)
    if not measured:
        raise DataError("; ".join(problems.values()))
    best_value, best_left_out = min(measured.values(), key=lambda item: item[0])
    results = []
    for name, path in snapshots.items():
        distance = above_best = None
        if name in measured:
            value, left_out = measured[name]
            distance = jackknife(value, left_out)
            # The groups that are left out have the same latents in all averages, so what a group
            # does to all of them drops out of the difference.
            pairs = zip(left_out, best_left_out, strict=True)
            above_best = jackknife(value - best_value, [mine - best for mine, best in pairs])
        problem = problems.get(name, "")
        results.append(AverageResult(name, str(path), distance, above_best, problem))
    return tuple(results)
