"""Evaluation of the generator during training, by all ranks together; all get the same metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch import nn

from ganscale.config import Config
from ganscale.data.shards import ShardSet
from ganscale.errors import DataError
from ganscale.evaluation.distributions.evaluate import column_of, evaluate
from ganscale.evaluation.distributions.evaluation import Evaluation, describe_reasons
from ganscale.evaluation.distributions.features import FeatureCache
from ganscale.evaluation.distributions.requirements import check_shape, unmet_requirements
from ganscale.evaluation.image_sets import GeneratedImages, ImageSet, ImagesOfShards, open_images
from ganscale.generation.sampler import SampleableGenerator
from ganscale.metrics.extractors import chosen_extractor, open_extractor
from ganscale.world import World


@dataclass(frozen=True)
class Measured:
    """What an evaluation gave, the same on all ranks."""

    row: dict[str, float]
    """Columns of metrics, and the seconds that it took."""
    fid: float | None
    """The Frechet distance by the run's extractor, by which the best generator is chosen."""
    problem: str
    """Why nothing could be measured, in one line; else empty."""
    skipped: dict[str, str]
    """Metrics that could not be computed, each with the reason."""


class Evaluator:
    """Measures generators of a run against its reference.

    Raises `ConfigError` or `DataError`, when it is made, if extractor or reference are not there,
    or if the numbers, shapes and labels of the images leave no metric that can be computed, or not
    the one that checkpoints are kept by.
    """

    def __init__(self, config: Config, shard_set: ShardSet, world: World) -> None:
        settings = config.evaluation
        self.config = config
        self.world = world
        # As in snapshots: metrics by class match classes by name, and labels are drawn by counts.
        self._info = {"classes": shard_set.classes, "class_counts": shard_set.class_counts}
        # Rank 0 decides what "auto" is: other machines may have other weights.
        name = [chosen_extractor(settings.extractor)]
        dist.broadcast_object_list(name, src=0)
        self.extractor = open_extractor(name[0])
        self.extractor.to(world.device)
        self._cache = FeatureCache()
        # The training set itself, unless the configuration names another one.
        self._reference: ImageSet = ImagesOfShards(shard_set)
        if settings.reference is not None:
            self._reference = open_images(settings.reference)
        self._check()
        measurement = [self._describe_measurement() if world.is_main else ""]
        dist.broadcast_object_list(measurement, src=0)
        self.measurement = measurement[0]
        """Says how the Frechet distance is measured; those of equal measurements may be compared.
        The same on all ranks."""

    def _describe_measurement(self) -> str:
        column = column_of("fid", self.extractor)
        num_images = self.config.evaluation.num_images
        return f"{column} of {num_images} images, reference {self._reference.digest[:16]}"

    def measure(
        self, model: nn.Module, nimg: int, *, alive: Callable[[], None] = lambda: None
    ) -> Measured:
        """Metrics of the averaged generator `model`; all ranks call this together.

        `alive` is called again and again while there is progress. The samples are of the same seeds
        each time. A generator that cannot be measured, since all its images are alike, is reported
        as a problem and does not end the run.
        """

        def started(what: str, total: int | None) -> Callable[[int], None]:
            # An evaluation takes longer than a step may; each sign of progress starts the
            # watchdog's clock anew.
            alive()
            return lambda num_images: alive()

        began = time.perf_counter()
        settings = self.config.evaluation
        samples = self._samples(model, nimg)
        evaluation: Evaluation | None = None
        problem = ""
        try:
            with torch.no_grad():
                evaluation = evaluate(
                    samples,
                    self._reference,
                    self.extractor,
                    self.world,
                    metrics=settings.metrics,
                    cache=self._cache,
                    start_task=started,
                )
        # Images that are all alike, for instance: a collapse that may pass is no reason to lose the
        # run.
        except DataError as error:
            problem = str(error)
        row = {} if evaluation is None else evaluation.row()
        row["time/evaluation_seconds"] = time.perf_counter() - began
        fid = row.get(f"metrics/{column_of('fid', self.extractor)}")
        skipped = {} if evaluation is None else dict(evaluation.skipped)
        # Rank 0's on all ranks: whether a generator is the best decides what is written.
        measured = [Measured(row, fid, problem, skipped)]
        dist.broadcast_object_list(measured, src=0)
        return measured[0]

    def _samples(self, model: nn.Module, nimg: int) -> GeneratedImages:
        spec = self.config.generator_spec
        generator = SampleableGenerator(model, spec=spec, info=self._info)
        num_images = self.config.evaluation.num_images
        return GeneratedImages(generator, num_images, 0, self.config.name, str(nimg))

    def _check(self) -> None:
        """Raise `DataError` for what would come again at each evaluation."""
        spec, metrics = self.config.generator_spec, self.config.evaluation.metrics
        shape = (spec["img_channels"], spec["resolution"], spec["resolution"])
        check_shape(shape, "the generator's images", self._reference)
        # Their numbers and labels alone are looked at, for which no network is needed.
        samples = self._samples(nn.Identity(), 0)
        unmet = unmet_requirements(metrics, samples, self._reference, self.extractor)
        # A metric that is missing beside others is reported with them.
        keeps_by_fid = self.config.checkpoint.best_metric == "fid"
        if len(unmet) == len(set(metrics)) or (keeps_by_fid and "fid" in unmet):
            raise DataError(f"evaluation.metrics: {describe_reasons(unmet)}")
