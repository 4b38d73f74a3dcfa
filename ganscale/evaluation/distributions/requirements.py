"""What metrics need of two sets of images, as far as it is known before any feature is extracted.

Features take minutes to hours, and the numbers and labels of the images are known at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ganscale.config import MetricName
from ganscale.errors import DataError
from ganscale.evaluation.distributions.features import MAX_ROWS, draw_indices
from ganscale.evaluation.gan_metrics.two_sample import check_num_images
from ganscale.evaluation.image_sets import ImageSet
from ganscale.evaluation.image_views import with_classes_of
from ganscale.metrics.extractors import FeatureExtractor
from ganscale.metrics.fid import check_extrapolation, check_reference, check_samples
from ganscale.metrics.inception_score import check_splits
from ganscale.metrics.kid import check_subsets
from ganscale.metrics.prdc import check_authenticity, check_prdc


def check_shape(shape: tuple[int, int, int], owner: str, reference: ImageSet) -> None:
    """Raise `DataError` if images of another shape than the reference's are to be compared."""
    if shape != reference.shape:
        raise DataError(
            f"{owner} have shape {shape}, {reference.description} {reference.shape}: only images "
            "of one shape can be compared"
        )


def unmet_requirements(
    metrics: Sequence[MetricName],
    samples: ImageSet,
    reference: ImageSet,
    extractor: FeatureExtractor,
    *,
    num_reference_rows: int | None = None,
) -> dict[str, str]:
    """Those of the metrics that cannot be computed, with the reasons.

    The arguments are those of `evaluate`. No image is read or drawn. A metric may still fail
    without being among these, such as that of images that are all alike.
    """
    num_rows = min(num_reference_rows or len(samples), len(reference), MAX_ROWS)
    planned = _Planned(samples, reference, extractor, num_rows)
    unmet: dict[str, str] = {}
    for metric in metrics:
        try:
            _CHECKS[metric](planned)
        except DataError as error:
            unmet[metric] = str(error)
    return unmet


@dataclass(frozen=True)
class _Planned:
    samples: ImageSet
    reference: ImageSet
    extractor: FeatureExtractor
    num_rows: int
    """Reference images that metrics of single images use."""

    @property
    def num_equal(self) -> int:
        """How many images of each set are used where both give equally many."""
        return min(len(self.samples), self.num_rows)


def _check_fid(planned: _Planned) -> None:
    check_samples(len(planned.samples))
    check_reference(len(planned.reference), planned.extractor.num_features)


def _check_fid_infinity(planned: _Planned) -> None:
    check_extrapolation(len(planned.samples), planned.extractor.num_features)
    check_reference(len(planned.reference), planned.extractor.num_features)


def _check_inception_score(planned: _Planned) -> None:
    check_splits(len(planned.samples))
    planned.extractor.logits(torch.zeros(1, planned.extractor.num_features))


def _check_fid_per_class(planned: _Planned) -> None:
    reference = planned.reference
    if planned.samples.labels is None or reference.labels is None:
        raise DataError("a Frechet distance per class needs labels of samples and reference")
    samples = with_classes_of(planned.samples, reference.classes, reference.description)
    assert samples.labels is not None
    kept = reference.labels[draw_indices(len(reference), MAX_ROWS)]
    for label, num_images in zip(*np.unique(kept, return_counts=True), strict=True):
        try:
            check_samples(int((samples.labels == label).sum()))
            check_reference(int(num_images), planned.extractor.num_features)
        except DataError as error:
            raise DataError(f"class {label}: {error}") from None


def _check_c2st_1nn(planned: _Planned) -> None:
    check_num_images(planned.num_equal, planned.num_equal)


_CHECKS: dict[MetricName, Callable[[_Planned], None]] = {
    "fid": _check_fid,
    "fid_infinity": _check_fid_infinity,
    "kid": lambda planned: check_subsets(len(planned.samples), planned.num_rows),
    "inception_score": _check_inception_score,
    "prdc": lambda planned: check_prdc(planned.num_equal),
    "authenticity": lambda planned: check_authenticity(planned.num_rows),
    "fid_per_class": _check_fid_per_class,
    "c2st_1nn": _check_c2st_1nn,
}
