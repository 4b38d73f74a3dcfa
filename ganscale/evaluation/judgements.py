"""What classifiers trained for the purpose say of generated images, as figures of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from ganscale.errors import ConfigError
from ganscale.evaluation.accuracy_score import (
    LONG_SCORE,
    SHORT_SCORE,
    classification_accuracy_score,
)
from ganscale.evaluation.distribution import Evaluation, Started
from ganscale.evaluation.images import ImageSet
from ganscale.evaluation.two_sample import LONG_TEST, SHORT_TEST, network_two_sample
from ganscale.metrics.intervals import Estimate

__all__ = ["JUDGEMENTS", "judged"]

JUDGEMENTS = ("c2st", "cas")
_NUM_SEEDS = 5


def judged(
    found: Evaluation,
    judgements: Sequence[str],
    samples: ImageSet,
    reference: ImageSet,
    test: ImageSet | None,
    *,
    device: str,
    started: Started = lambda what, total: lambda num: None,
) -> Evaluation:
    """The evaluation with further figures.

    `c2st` is a network's two-sample test of samples and reference, `cas` trains classifiers on the
    samples and on the reference and tests both on `test`, real images of another split. On a GPU
    both train longer and wider networks, and say so in the details.

    Raises:
        ConfigError: no `test`, or images without labels, for `cas`; an unknown judgement.
        DataError: images are too few or of different shapes.
    """
    unknown = [name for name in judgements if name not in JUDGEMENTS]
    if unknown:
        raise ConfigError(f"judgement {unknown[0]!r}: expected some of {', '.join(JUDGEMENTS)}")
    where = torch.device(device)
    metrics: dict[str, Estimate] = dict(found.metrics)
    details, seconds = dict(found.details), dict(found.seconds)
    for name in judgements:
        began = time.perf_counter()
        if name == "c2st":
            recipe = SHORT_TEST if where.type == "cpu" else LONG_TEST
            progress = started("two-sample test", _NUM_SEEDS * recipe.num_passes)
            report = network_two_sample(
                reference,
                samples,
                seeds=range(_NUM_SEEDS),
                recipe=recipe,
                device=where,
                progress=progress,
            )
            metrics["c2st"], details["c2st"] = report.accuracy, report.to_json()
        else:
            if test is None:
                raise ConfigError("cas needs real images that nothing was trained on: give --test")
            recipe = SHORT_SCORE if where.type == "cpu" else LONG_SCORE
            progress = started("classification accuracy score", 2 * recipe.num_passes)
            score = classification_accuracy_score(
                samples, reference, test, recipe=recipe, device=where, progress=progress
            )
            metrics["cas"] = score.gan_train.accuracy
            metrics["gan_test"] = score.gan_test.accuracy
            metrics["cas_of_real"] = score.real.accuracy
            details["cas"] = score.to_json()
        seconds[name] = time.perf_counter() - began
    return replace(found, metrics=metrics, details=details, seconds=seconds)
