"""How far generated images are from real ones: the distances and shares of the field.

One call gives all of them, with the protocol they were measured by: network, resizing, reference
and numbers of images move them by more than most improvements do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ganscale.config import MetricName
from ganscale.errors import DataError
from ganscale.evaluation.features import FeatureCache, Features, extract
from ganscale.evaluation.images import ImageSet
from ganscale.evaluation.two_sample import neighbour_two_sample
from ganscale.metrics.extractors import FeatureExtractor
from ganscale.metrics.frechet import frechet_distance, frechet_estimate, frechet_infinity
from ganscale.metrics.inception_score import inception_score
from ganscale.metrics.intervals import Estimate, of_repeats
from ganscale.metrics.kernel import kernel_distance
from ganscale.metrics.neighbours import authenticity, neighbourhood
from ganscale.metrics.statistics import Moments
from ganscale.world import World

__all__ = ["METRICS", "Evaluation", "Protocol", "evaluate", "frechet_name"]

METRICS: tuple[MetricName, ...] = get_args(MetricName)

Started = Callable[[str, int | None], Callable[[int], None]]


@dataclass(frozen=True)
class Protocol:
    """By what the figures were measured; those of other protocols cannot be compared."""

    extractor: str
    extractor_digest: str
    resizer: str
    samples: str
    num_samples: int
    reference: str
    reference_digest: str
    num_reference: int


@dataclass(frozen=True)
class Evaluation:
    """The figures of one comparison."""

    protocol: Protocol
    metrics: Mapping[str, Estimate]
    skipped: Mapping[str, str]
    """Metrics that say nothing here, and why."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What more there is to say of a metric, by its name."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long each part took."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "protocol": asdict(self.protocol),
            "metrics": {name: asdict(value) for name, value in self.metrics.items()},
            "skipped": dict(self.skipped),
            "details": dict(self.details),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }

    def row(self) -> dict[str, float]:
        """As columns of a run's metrics."""
        return {f"metrics/{name}": value.value for name, value in self.metrics.items()}


def frechet_name(extractor: FeatureExtractor) -> str:
    """What the Frechet distance is called: fid with Inception, fd_... with others."""
    return f"{_stem('frechet', extractor)}{extractor.suffix}"


def evaluate(
    samples: ImageSet,
    reference: ImageSet,
    extractor: FeatureExtractor,
    world: World,
    *,
    metrics: Sequence[MetricName] = METRICS,
    required: bool = False,
    cache: FeatureCache | None = None,
    started: Started = lambda what, total: lambda num: None,
    device: str = "cpu",
) -> Evaluation | None:
    """Compare images with a reference; the figures are on rank 0, None elsewhere.

    Args:
        samples, reference: of one shape.
        extractor: of the features.
        world: of the process group; all its ranks share the work.
        metrics: which.
        required: whether a metric that cannot be had is an error; else it is skipped with a reason.
        cache: keeps the reference's features.
        started: told of each part and its number of images; what it returns is told of progress.
        device: where distances between features are computed.

    Raises:
        DataError: images are too few, unreadable, of different shapes, all alike, or have features
            that are not finite.
    """
    if samples.shape != reference.shape:
        raise DataError(
            f"{samples.description} have shape {samples.shape}, {reference.description} "
            f"{reference.shape}: only images of one shape can be compared"
        )
    protocol = Protocol(
        extractor=extractor.name,
        extractor_digest=extractor.digest,
        resizer=extractor.resizer,
        samples=samples.description,
        num_samples=len(samples),
        reference=reference.description,
        reference_digest=reference.digest,
        num_reference=len(reference),
    )
    if not metrics:
        return Evaluation(protocol, {}, {}) if world.is_main else None
    _check_same_on_all_ranks(extractor.digest, len(samples), len(reference))
    seconds: dict[str, float] = {}
    with _timed("reference", seconds):
        progress = started(reference.description, len(reference))
        keep = cache.extract if cache is not None else extract
        of_reference = keep(reference, extractor, world, progress=progress)
    with _timed("samples", seconds):
        progress = started(samples.description, len(samples))
        of_samples = extract(samples, extractor, world, progress=progress)
    if of_samples is None or of_reference is None:
        return None
    found: dict[str, Estimate] = {}
    skipped: dict[str, str] = {}
    comparison = _Comparison(of_samples, of_reference, extractor, device)
    for metric in metrics:
        with _timed(metric, seconds):
            started(metric, None)
            try:
                found |= _FIGURES[metric](comparison)
            except (DataError, LinAlgError, MemoryError, torch.OutOfMemoryError) as error:
                if required:
                    raise DataError(f"{metric}: {error}") from None
                skipped[metric] = str(error)
    if skipped and not found:
        raise DataError("; ".join(skipped.values()))
    return Evaluation(protocol, found, skipped, seconds=seconds)


def _check_same_on_all_ranks(*what: object) -> None:
    """Else features of different networks would be put together."""
    found: list[tuple[object, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(found, what)
    if len(set(found)) > 1:
        raise DataError(f"ranks have different extractors or images: {found}")


@dataclass(frozen=True)
class _Comparison:
    samples: Features
    reference: Features
    extractor: FeatureExtractor
    device: str

    def rows(self) -> tuple[Tensor, Tensor]:
        """Features of both, equally many, on the device."""
        mine, other = self.samples.rows, self.reference.rows
        num = min(len(mine), len(other))
        return self._some(mine, num), self._some(other, num)

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """All that were kept, on the device."""
        return self.samples.rows.to(self.device), self.reference.rows.to(self.device)

    def named(self, *stems: tuple[str, Estimate]) -> dict[str, Estimate]:
        return {f"{_stem(s, self.extractor)}{self.extractor.suffix}": value for s, value in stems}

    def _some(self, rows: Tensor, num: int) -> Tensor:
        if len(rows) > num:
            chosen = np.random.default_rng(0).permutation(len(rows))[:num]
            rows = rows[torch.from_numpy(np.sort(chosen))]
        return rows.to(self.device)


def _frechet(both: _Comparison) -> dict[str, Estimate]:
    return both.named(("frechet", frechet_estimate(both.samples.rows, both.reference.moments)))


def _frechet_infinity(both: _Comparison) -> dict[str, Estimate]:
    value = frechet_infinity(both.samples.rows, both.reference.moments)
    return both.named(("frechet_infinity", value))


def _kernel(both: _Comparison) -> dict[str, Estimate]:
    return both.named(("kernel", kernel_distance(*both.all_rows())))


def _inception_score(both: _Comparison) -> dict[str, Estimate]:
    logits = both.extractor.logits(both.samples.rows)
    if logits is None:
        raise DataError(f"only inception-v3 gives an inception score, not {both.extractor.name}")
    return {"inception_score": inception_score(logits)}


def _neighbourhood(both: _Comparison) -> dict[str, Estimate]:
    found = neighbourhood(*both.rows())
    return both.named(
        ("precision", found.precision),
        ("recall", found.recall),
        ("density", found.density),
        ("coverage", found.coverage),
    )


def _authenticity(both: _Comparison) -> dict[str, Estimate]:
    return both.named(("authenticity", authenticity(*both.all_rows())))


def _frechet_per_class(both: _Comparison) -> dict[str, Estimate]:
    mine, other = both.samples.labels, both.reference.labels
    if mine is None or other is None:
        raise DataError("a Frechet distance per class needs labels of samples and reference")
    distances = []
    for label in np.unique(other).tolist():
        parts = [
            Moments.of(features.rows[torch.from_numpy(labels == label)])
            for features, labels in ((both.samples, mine), (both.reference, other))
        ]
        try:
            distances.append(frechet_distance(*parts))
        except DataError as error:
            raise DataError(f"class {label}: {error}") from None
    return both.named(("frechet_per_class", of_repeats(distances)))


def _nearest_neighbour_test(both: _Comparison) -> dict[str, Estimate]:
    mine, other = both.rows()
    return both.named(("c2st_1nn", neighbour_two_sample(other, mine).accuracy))


_FIGURES: dict[MetricName, Callable[[_Comparison], dict[str, Estimate]]] = {
    "frechet": _frechet,
    "frechet_infinity": _frechet_infinity,
    "kernel": _kernel,
    "inception_score": _inception_score,
    "neighbourhood": _neighbourhood,
    "authenticity": _authenticity,
    "frechet_per_class": _frechet_per_class,
    "c2st_1nn": _nearest_neighbour_test,
}
_STEMS = {"frechet": "fd", "kernel": "kd"}
_INCEPTION_STEMS = {"frechet": "fid", "kernel": "kid"}


def _stem(name: str, extractor: FeatureExtractor) -> str:
    """The field's name of a figure: fid and kid are those with Inception."""
    stems = _STEMS if extractor.suffix else _INCEPTION_STEMS
    first, _, rest = name.partition("_")
    return "_".join([stems.get(first, first), *([rest] if rest else [])])


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - began
