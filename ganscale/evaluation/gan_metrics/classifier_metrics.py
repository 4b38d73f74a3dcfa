"""Metrics for which classifiers are trained on generated images, as part of an evaluation.

They take minutes to hours, so `ganscale evaluate` computes them only when they are named. One
process computes them, whatever the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ganscale.errors import ConfigError, DataError
from ganscale.evaluation.distributions.evaluation import Evaluation, describe_reasons
from ganscale.evaluation.distributions.features import StartTask
from ganscale.evaluation.gan_metrics.two_sample import (
    LONG_TEST,
    SHORT_TEST,
    check_images,
    check_num_images,
    network_two_sample,
)
from ganscale.evaluation.image_sets import ImageSet
from ganscale.evaluation.recognition.accuracy_score import (
    LONG_SCORE,
    SHORT_SCORE,
    classification_accuracy_score,
    matched_sets,
)
from ganscale.metrics.intervals import Estimate

CLASSIFIER_METRICS = ("c2st", "cas")
# Twice the median p-value over seeds is reported: one split by chance decides nothing.
_NUM_SEEDS = 5


def check_classifier_metrics(
    names: Sequence[str], samples: ImageSet, reference: ImageSet, test: ImageSet | None
) -> None:
    """Raise an error if it is known that `with_classifier_metrics` cannot compute one of `names`.

    It is a `ConfigError` for `cas` without `test` or labels, a `DataError` for images that are too
    few, or of other shapes or classes.
    """
    if "c2st" in names:
        check_num_images(len(reference), len(samples))
        check_images(reference, samples)
    if "cas" in names:
        if test is None:
            raise ConfigError("cas needs real images that nothing was trained on: give --test")
        matched_sets(samples, reference, test)


def with_classifier_metrics(
    evaluation: Evaluation,
    names: Sequence[str],
    samples: ImageSet,
    reference: ImageSet,
    test: ImageSet | None,
    *,
    device: torch.device,
    start_task: StartTask,
) -> Evaluation:
    """The evaluation with those of the metrics `names` added for which classifiers are trained.

    `c2st` is a network's two-sample test of samples and reference, `cas` trains classifiers on the
    samples and on the reference and tests both on `test`, real images of another split. On a GPU
    both train longer and wider networks, and say so in the details. One that fails is skipped with
    the reason: `check_classifier_metrics` says before all the work what is known to fail.

    Raises `DataError` if no metric at all has a value.
    """
    metrics: dict[str, Estimate] = dict(evaluation.metrics)
    details, seconds = dict(evaluation.details), dict(evaluation.seconds)
    skipped = dict(evaluation.skipped)
    for name in names:
        began = time.perf_counter()
        try:
            if name == "c2st":
                values, details[name] = _two_sample_test(samples, reference, device, start_task)
            elif name == "cas":
                assert test is not None, "checked before anything was measured"
                values, details[name] = _accuracy_score(
                    samples, reference, test, device, start_task
                )
            else:
                continue
            metrics |= values
        # An image that cannot be read, or one that does not fit in memory, costs no other metric.
        except (DataError, MemoryError, torch.OutOfMemoryError) as error:
            skipped[name] = str(error)
        seconds[name] = time.perf_counter() - began
    if skipped and not metrics:
        raise DataError(describe_reasons(skipped))
    return replace(evaluation, metrics=metrics, skipped=skipped, details=details, seconds=seconds)


def _two_sample_test(
    samples: ImageSet, reference: ImageSet, device: torch.device, start_task: StartTask
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """The column of `c2st` and its details."""
    recipe = SHORT_TEST if device.type == "cpu" else LONG_TEST
    progress = start_task("two-sample test", _NUM_SEEDS * recipe.num_passes)
    report = network_two_sample(
        reference,
        samples,
        seeds=range(_NUM_SEEDS),
        recipe=recipe,
        device=device,
        progress=progress,
    )
    return {"c2st": report.accuracy}, report.to_json()


def _accuracy_score(
    samples: ImageSet,
    reference: ImageSet,
    test: ImageSet,
    device: torch.device,
    start_task: StartTask,
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """The columns of `cas` and its details."""
    recipe = SHORT_SCORE if device.type == "cpu" else LONG_SCORE
    progress = start_task("classification accuracy score", 2 * recipe.num_passes)
    score = classification_accuracy_score(
        samples, reference, test, recipe=recipe, device=device, progress=progress
    )
    # The accuracy with real images is reported beside both, since by itself neither says what is
    # lost.
    columns = {
        "cas": score.gan_train.accuracy,
        "gan_test": score.gan_test.accuracy,
        "cas_of_real": score.real.accuracy,
    }
    return columns, score.to_json()
