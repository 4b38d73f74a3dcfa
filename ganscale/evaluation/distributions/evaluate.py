"""Metrics of generated images against real ones: FID, KID, precision, recall and others.

One call computes all of them, and reports the protocol: network, resizing, reference and numbers of
images change the values by more than most improvements of a GAN do.

Metrics that compare distributions by their moments use those of the whole reference, and the FID of
each class all rows that are kept. Metrics that look at single images use as many of the reference
as there are samples, drawn with a fixed seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ganscale.config import MetricName
from ganscale.errors import DataError
from ganscale.evaluation.distributions.evaluation import Evaluation, Protocol, describe_reasons
from ganscale.evaluation.distributions.features import (
    MAX_ROWS,
    FeatureCache,
    Features,
    ReferenceFeatures,
    StartTask,
    draw_indices,
    extract,
    plan_reference,
)
from ganscale.evaluation.distributions.requirements import check_shape, unmet_requirements
from ganscale.evaluation.gan_metrics.two_sample import mean_neighbour_accuracy
from ganscale.evaluation.image_sets import ImageSet
from ganscale.evaluation.image_views import Subset, with_classes_of
from ganscale.metrics.extractors import FeatureExtractor
from ganscale.metrics.fid import frechet_distance, frechet_estimate, frechet_infinity
from ganscale.metrics.inception_score import inception_score
from ganscale.metrics.intervals import Estimate, t_interval
from ganscale.metrics.kid import kernel_distance
from ganscale.metrics.prdc import authenticity, prdc
from ganscale.metrics.statistics import Moments
from ganscale.world import World

METRICS: tuple[MetricName, ...] = get_args(MetricName)


def column_of(metric: str, extractor: FeatureExtractor) -> str:
    """The column of a metric: `fid` and `kid` of Inception, `fd_...` and `kd_...` of others."""
    if not extractor.suffix:
        return metric
    first, _, rest = metric.partition("_")
    # FID and KID are names of the distances of Inception's features; others are on other scales.
    stem = {"fid": "fd", "kid": "kd"}.get(first, first)
    return f"{stem}_{rest}{extractor.suffix}" if rest else f"{stem}{extractor.suffix}"


def evaluate(
    samples: ImageSet,
    reference: ImageSet,
    extractor: FeatureExtractor,
    world: World,
    *,
    metrics: Sequence[MetricName] = METRICS,
    num_reference_rows: int | None = None,
    required: bool = False,
    cache: FeatureCache | None = None,
    start_task: StartTask = lambda what, total: lambda num: None,
) -> Evaluation | None:
    """Compare images with a reference; returns the metrics on rank 0, None on other ranks.

    Args:
        samples, reference: of one shape; of more than 50,000 samples so many are drawn at random.
        extractor: of the features.
        world: of the process group; all its ranks share the work, and distances between features
            are computed on the device of rank 0.
        metrics: the names of those to compute.
        num_reference_rows: how many images of the reference `ROW_METRICS` use; by default as many
            as there are samples.
        required: whether a metric is an error that is known beforehand not to be computable; else
            it is skipped with a reason, as is one that fails later.
        cache: keeps the reference's features.
        start_task: called with each part and its number of images; what it returns is called with
            progress.

    Raises:
        DataError: no metric can be computed, or one that is required; images are unreadable, of
            different shapes, or have features that are not finite.
    """
    check_shape(samples.shape, samples.description, reference)
    # So many rows are kept, and the protocol is to say which images were measured.
    samples = Subset.random(samples, MAX_ROWS, seed=0)
    protocol = Protocol(
        extractor=extractor.name,
        extractor_digest=extractor.digest,
        resizer=extractor.resizer,
        samples=samples.description,
        num_samples=len(samples),
        reference=reference.description,
        reference_digest=reference.digest,
        num_reference=len(reference),
        reference_statistics="extracted",
        num_reference_rows=0,
    )
    if not metrics:
        return Evaluation(protocol, {}, {}) if world.is_main else None
    _check_same_on_all_ranks(extractor.digest, samples.digest, reference.digest)
    skipped = unmet_requirements(
        metrics, samples, reference, extractor, num_reference_rows=num_reference_rows
    )
    metrics = [metric for metric in metrics if metric not in skipped]
    if skipped and (required or not metrics):
        raise DataError(describe_reasons(skipped))
    if "fid_per_class" in metrics:
        samples = with_classes_of(samples, reference.classes, reference.description)
    num_rows = (num_reference_rows or len(samples)) if ROW_METRICS.intersection(metrics) else 0
    rows = draw_indices(len(reference), min(num_rows, MAX_ROWS))
    # A class has only a part of the rows, and its FID needs more of them than there are features.
    num_kept = MAX_ROWS if "fid_per_class" in metrics else len(rows)
    seconds: dict[str, float] = {}
    with _timed("reference", seconds):
        plan = plan_reference(
            reference, extractor, world, num_rows=num_kept, cache=cache, start_task=start_task
        )
        of_reference = plan.features(extractor, world, cache=cache, start_task=start_task)
    with _timed("samples", seconds):
        progress = start_task(samples.description, len(samples))
        of_samples = extract(samples, extractor, world, progress=progress)
    if of_samples is None or of_reference is None:
        return None
    comparison = _Comparison(
        of_samples, of_reference.with_rows_of(rows), of_reference, extractor, world.device
    )
    estimates, failed = _estimates(metrics, comparison, seconds=seconds, start_task=start_task)
    skipped |= failed
    # An evaluation without a single value would pass for a successful one in a run's files.
    if skipped and not estimates:
        raise DataError(describe_reasons(skipped))
    protocol = replace(
        protocol,
        reference_statistics=plan.statistics.name if plan.statistics else "extracted",
        num_reference_rows=len(rows),
    )
    return Evaluation(protocol, estimates, skipped, seconds=seconds)


def _estimates(
    metrics: Sequence[MetricName],
    comparison: _Comparison,
    *,
    seconds: dict[str, float],
    start_task: StartTask,
) -> tuple[dict[str, Estimate], dict[str, str]]:
    """The values by column, and the reasons of metrics that could not be computed.

    Adds the duration of each to `seconds`.
    """
    estimates: dict[str, Estimate] = {}
    failed: dict[str, str] = {}
    for metric in metrics:
        with _timed(metric, seconds):
            start_task(metric, None)
            # Features have been extracted for minutes by now: a decomposition that does not
            # converge or distances that do not fit in memory cost one metric and not the whole
            # evaluation.
            try:
                estimates |= _COMPUTE[metric](comparison)
            except (DataError, LinAlgError, MemoryError, torch.OutOfMemoryError) as error:
                failed[metric] = str(error)
    return estimates, failed


def _check_same_on_all_ranks(*what: object) -> None:
    """Raise `DataError` if ranks differ in any of these values."""
    # With `extractor: auto`, nodes may find different weights on their disks, and the newest
    # snapshot of a run that trains may be another one for the next rank: rank 0 would mix features
    # of two networks, or of two generators, without noticing.
    by_rank: list[tuple[object, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(by_rank, what)
    if len(set(by_rank)) > 1:
        raise DataError(
            "ranks have different extractors or images (of a run that trains, name one snapshot by "
            f"--snapshot): {by_rank}"
        )


@dataclass(frozen=True)
class _Comparison:
    samples: Features
    reference: ReferenceFeatures
    """With the rows that metrics of single images use."""
    labelled_reference: ReferenceFeatures
    """With the rows for metrics by class, which include those."""
    extractor: FeatureExtractor
    device: str

    def rows(self) -> tuple[Tensor, Tensor]:
        """Features of equally many images of both, on the device."""
        mine, other = self.samples.rows, self.reference.rows
        num = min(len(mine), len(other))
        return self._some(mine, num), self._some(other, num)

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """Features of all samples and of the reference's drawn images, on the device."""
        return self.samples.rows.to(self.device), self.reference.rows.to(self.device)

    def named(self, *stems: tuple[str, Estimate]) -> dict[str, Estimate]:
        """The estimates by their columns for this extractor."""
        return {column_of(name, self.extractor): value for name, value in stems}

    def _some(self, rows: Tensor, num: int) -> Tensor:
        # At random, since the sets may be ordered by class. Precision, recall and the 1-NN test
        # depend on the ratio of the numbers of images, so both sets give equally many.
        if len(rows) > num:
            chosen = np.random.default_rng(0).permutation(len(rows))[:num]
            rows = rows[torch.from_numpy(np.sort(chosen))]
        return rows.to(self.device)


def _fid(comparison: _Comparison) -> dict[str, Estimate]:
    # Of rows and not of the samples' moments, since the jackknife regroups them.
    return comparison.named(
        ("fid", frechet_estimate(comparison.samples.rows, comparison.reference.moments))
    )


def _fid_infinity(comparison: _Comparison) -> dict[str, Estimate]:
    value = frechet_infinity(comparison.samples.rows, comparison.reference.moments)
    return comparison.named(("fid_infinity", value))


def _kid(comparison: _Comparison) -> dict[str, Estimate]:
    # Subsets have a fixed size, so the sets may have different numbers of images.
    return comparison.named(("kid", kernel_distance(*comparison.all_rows())))


def _inception_score(comparison: _Comparison) -> dict[str, Estimate]:
    return {
        "inception_score": inception_score(comparison.extractor.logits(comparison.samples.rows))
    }


def _prdc(comparison: _Comparison) -> dict[str, Estimate]:
    shares = prdc(*comparison.rows())
    return comparison.named(
        ("precision", shares.precision),
        ("recall", shares.recall),
        ("density", shares.density),
        ("coverage", shares.coverage),
    )


def _authenticity(comparison: _Comparison) -> dict[str, Estimate]:
    # All rows of the reference, since a sample may be a copy of any of them.
    return comparison.named(("authenticity", authenticity(*comparison.all_rows())))


def _fid_per_class(comparison: _Comparison) -> dict[str, Estimate]:
    reference = comparison.labelled_reference
    sample_labels, reference_labels = comparison.samples.labels, reference.labels
    assert sample_labels is not None, "checked before anything was measured"
    assert reference_labels is not None, "checked before anything was measured"
    # Only the reference's kept rows have labels: included statistics are of all classes together.
    distances = []
    for label in np.unique(reference_labels).tolist():
        parts = [
            Moments.of(features.rows[torch.from_numpy(labels == label)])
            for features, labels in (
                (comparison.samples, sample_labels),
                (reference, reference_labels),
            )
        ]
        try:
            distances.append(frechet_distance(*parts))
        except DataError as error:
            raise DataError(f"class {label}: {error}") from None
    return comparison.named(("fid_per_class", t_interval(distances)))


def _nearest_neighbour_test(comparison: _Comparison) -> dict[str, Estimate]:
    samples, reference = comparison.rows()
    return comparison.named(("c2st_1nn", mean_neighbour_accuracy(reference, samples)))


_COMPUTE: dict[MetricName, Callable[[_Comparison], dict[str, Estimate]]] = {
    "fid": _fid,
    "fid_infinity": _fid_infinity,
    "kid": _kid,
    "inception_score": _inception_score,
    "prdc": _prdc,
    "authenticity": _authenticity,
    "fid_per_class": _fid_per_class,
    "c2st_1nn": _nearest_neighbour_test,
}
ROW_METRICS: frozenset[MetricName] = frozenset({"kid", "prdc", "authenticity", "c2st_1nn"})
"""Metrics that look at single images of the reference, not only at the moments of all."""


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - began
