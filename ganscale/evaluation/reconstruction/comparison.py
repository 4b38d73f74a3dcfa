"""A comparison of runs of any training method: costs, quality of samples, reconstructions.

For VAEs, GANs and hybrids alike it measures how close samples are to real images, how close
reconstructions of degraded images are to the originals, and time and memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ganscale.config import MetricName, load_config
from ganscale.errors import ConfigError, DataError
from ganscale.evaluation.distributions.evaluate import evaluate
from ganscale.evaluation.distributions.evaluation import describe_reasons
from ganscale.evaluation.distributions.features import FeatureCache, StartTask
from ganscale.evaluation.distributions.requirements import check_shape, unmet_requirements
from ganscale.evaluation.image_sets import GeneratedImages, ImageSet
from ganscale.evaluation.reconstruction.reconstruct import (
    ReconstructionMethod,
    Reconstructor,
    reconstruct,
    similarity,
)
from ganscale.generation.degradations import Degradation
from ganscale.generation.inversion import InversionSettings
from ganscale.generation.sampler import SampleableGenerator
from ganscale.generation.snapshot import snapshot_file
from ganscale.metrics.extractors import EfficientNetLite0, FeatureExtractor
from ganscale.metrics.intervals import Estimate, t_interval
from ganscale.run_directory import RunDirectory, containing_run
from ganscale.tracking.history import History
from ganscale.world import World

_MEMORY = ("gpu/peak_memory_gib", "workers/0/memory_gib")
"""Columns of peak memory in order of preference: of the GPU, else of the process."""


@dataclass(frozen=True)
class EvaluationNetworks:
    """The networks that measure images, and the process group."""

    extractor: FeatureExtractor
    network: EfficientNetLite0
    """The network of the perceptual distance."""
    world: World


@dataclass(frozen=True)
class ComparedRun:
    """One run at the position of a snapshot."""

    name: str
    snapshot: Path
    run_dir: RunDirectory
    method: str
    reconstructors: Mapping[ReconstructionMethod, Reconstructor]
    """By inversion, and by its encoder if the run has one."""

    @property
    def generator(self) -> SampleableGenerator:
        """The generator, which all reconstructors share."""
        return self._any.generator

    @property
    def nimg(self) -> int:
        """The number of real images that the snapshot was trained on."""
        return int(self.generator.info["nimg"])

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the generator, and of the encoder if there is one."""
        networks = [self.generator.model, self._any.encoder]
        return sum(p.numel() for n in networks if n is not None for p in n.parameters())

    def to_json(self, cost: TrainingCost, metrics: Mapping[str, Estimate]) -> dict[str, Any]:
        """Plain values, with the costs and the metrics of its samples."""
        return {
            "name": self.name,
            "snapshot": str(self.snapshot),
            "method": self.method,
            "nimg": self.nimg,
            "parameters": self.num_parameters,
            **asdict(cost),
            **{name: asdict(value) for name, value in metrics.items()},
        }

    @property
    def _any(self) -> Reconstructor:
        # All reconstructors share generator and encoder.
        return next(iter(self.reconstructors.values()))


@dataclass(frozen=True)
class TrainingCost:
    """Time, speed and memory of the training, from the run's rows of metrics."""

    seconds: float
    """Training time, without the time between attempts."""
    images_per_second: float
    """The mean over the whole training."""
    peak_memory_gib: float | None
    """GPU memory of rank 0, or that of its process without a GPU; None if no row has it."""


@dataclass(frozen=True)
class TaskResult:
    """The reconstructions of one method of one run, or the trivial ones, and their similarity."""

    name: str
    similarities: Mapping[str, Estimate]
    """Means over the images, by measure."""
    seconds_per_image: float | None
    images: Tensor
    """uint8 (n, C, H, W)."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the images."""
        return {
            "name": self.name,
            "figures": {name: asdict(value) for name, value in self.similarities.items()},
            "seconds_per_image": self.seconds_per_image,
        }


def load_run(text: str, search: InversionSettings, *, device: str = "cpu") -> ComparedRun:
    """Load a run's newest snapshot, named RUN, or a snapshot in a run, named RUN@KIMG.

    Snapshots of a further average are named RUN/AVERAGE and RUN/AVERAGE@KIMG.

    Raises `ConfigError` if it is no part of a run, `CheckpointError` if it has no snapshot.
    """
    snapshot = snapshot_file(Path(text).expanduser().absolute())
    run_dir = containing_run(snapshot)
    if run_dir is None:
        raise ConfigError(f"{text} is not part of a run: expected its folder, or a snapshot in it")
    by_default = Reconstructor.load(snapshot, search=search, device=device)
    # Both methods share one generator, which is loaded once.
    names: tuple[ReconstructionMethod, ...] = (
        ("encoder", "inversion") if by_default.encoder else ("inversion",)
    )
    reconstructors = {
        by: Reconstructor(by_default.generator, by_default.encoder, by, search) for by in names
    }
    method = load_config(run_dir.config).method.name
    kimg = by_default.generator.info["nimg"] / 1000
    is_average = snapshot.parent.parent == run_dir.snapshots
    name = f"{run_dir.name}/{snapshot.parent.name}" if is_average else run_dir.name
    if not Path(text).expanduser().is_dir():
        name += f"@{kimg:g}"
    return ComparedRun(name, snapshot, run_dir, method, reconstructors)


def training_cost(run: ComparedRun) -> TrainingCost:
    """The cost of training the run as far as its snapshot."""
    history = History.read(run.run_dir)
    # The run may have been trained on since the snapshot.
    rows = [row for row in history.rows if row["nimg"] <= run.nimg]
    speeds = [(row["nimg"], row.get("time/images_per_second")) for row in rows]
    # Images over speed, row by row, and not the difference of clocks: a run that waited for a
    # machine was not trained meanwhile.
    seconds, before = 0.0, 0
    for nimg, speed in speeds:
        if speed:
            seconds += (nimg - before) / speed
            before = nimg
    peaks = [max((row[name] for row in rows if name in row), default=None) for name in _MEMORY]
    peak = next((peak for peak in peaks if peak is not None), None)
    return TrainingCost(seconds, before / seconds if seconds else 0.0, peak)


def check_sample_metrics(
    run: ComparedRun,
    reference: ImageSet,
    extractor: FeatureExtractor,
    *,
    metric: MetricName,
    num_images: int,
) -> None:
    """Raise `DataError` if it is known that `sample_metrics` cannot compute the metric."""
    samples = GeneratedImages(run.generator, num_images, 0, run.name, "")
    check_shape(samples.shape, samples.description, reference)
    if unmet := unmet_requirements([metric], samples, reference, extractor):
        raise DataError(describe_reasons(unmet))


def sample_metrics(
    run: ComparedRun,
    reference: ImageSet,
    networks: EvaluationNetworks,
    *,
    metric: MetricName,
    num_images: int,
    start_task: StartTask,
) -> Mapping[str, Estimate]:
    """A metric of `num_images` samples, with seeds from 0, against the reference."""
    samples = GeneratedImages.of_snapshot(run.snapshot, num_images, device=networks.world.device)
    evaluation = evaluate(
        samples,
        reference,
        networks.extractor,
        networks.world,
        metrics=[metric],
        required=True,
        cache=FeatureCache(),
        start_task=start_task,
    )
    assert evaluation is not None
    return evaluation.metrics


def reconstruct_with_all(
    runs: Sequence[ComparedRun],
    images: ImageSet,
    degradation: Degradation,
    networks: EvaluationNetworks,
    *,
    seed: int,
    start_task: StartTask,
) -> tuple[Tensor, list[TaskResult]]:
    """The original images, uint8 (n, C, H, W), and the results: first of the trivial
    reconstruction, then of each method of each run.

    One process computes all of them one after another, so that times are comparable.
    """
    results: list[TaskResult] = []
    truth = torch.empty(0)
    for run in runs:
        for by, reconstructor in run.reconstructors.items():
            name = f"{run.name}, {by}"
            progress = start_task(
                f"{degradation.name}: {name}", reconstructor.num_steps(len(images))
            )
            # An inversion's time includes the forwards of its pool, which are shared by all images.
            began = time.perf_counter()
            made = reconstruct(
                reconstructor, images, degradation, networks.world, seed=seed, progress=progress
            )
            seconds = (time.perf_counter() - began) / len(images)
            assert made is not None
            truth = made.truth
            # The trivial reconstruction does not depend on the run.
            if not results:
                results.append(_measured("trivial", made.trivial, truth, networks, None))
            results.append(_measured(name, made.images, truth, networks, seconds))
    return truth, results


def _measured(
    name: str, images: Tensor, truth: Tensor, networks: EvaluationNetworks, seconds: float | None
) -> TaskResult:
    # Intervals are over images: the degradation and the seed are given.
    each = similarity(images, truth, networks.extractor, networks.network)
    similarities = {metric: t_interval(values.tolist()) for metric, values in each.items()}
    return TaskResult(name, similarities, seconds, images)
