"""Runs beside each other, whatever they were trained by: what each costs, generates, brings back.

A variational autoencoder, a GAN and what lies between are asked the same: how near samples are to
real images, how near degraded images come back to what they were, in what time and memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ganscale.config import MetricName, load_config
from ganscale.errors import ConfigError
from ganscale.evaluation.distributions.evaluate import Workload, evaluate
from ganscale.evaluation.distributions.features import FeatureCache
from ganscale.evaluation.image_sets import GeneratedImages, ImageSet
from ganscale.evaluation.reconstruction.reconstruct import (
    By,
    Reconstructor,
    reconstruct,
    similarity,
)
from ganscale.evaluation.run_references import containing_run
from ganscale.generation.degradations import Degradation
from ganscale.generation.inversion import Search
from ganscale.generation.snapshot import snapshot_file
from ganscale.metrics.extractors import EfficientNetLite0, FeatureExtractor
from ganscale.metrics.intervals import Estimate, of_repeats
from ganscale.run_directory import RunDirectory
from ganscale.tracking.history import History
from ganscale.world import World

__all__ = ["Cost", "Entry", "Judges", "Restored", "cost_of", "enter", "quality", "restored"]

StartTask = Callable[[str, int | None], Callable[[int], None]]

_MEMORY = ("gpu/peak_memory_gib", "workers/0/memory_gib")
"""On a GPU, and of the process where there is none: in order of preference."""


@dataclass(frozen=True)
class Judges:
    """By what images are judged, and where."""

    extractor: FeatureExtractor
    network: EfficientNetLite0
    """Of the perceptual distance."""
    world: World


@dataclass(frozen=True)
class Entry:
    """One run, as it was when a snapshot was written."""

    name: str
    snapshot: Path
    run_dir: RunDirectory
    method: str
    ways: Mapping[By, Reconstructor]
    """By encoder, by inversion: those that the run has."""

    @property
    def nimg(self) -> int:
        """Images the snapshot had been trained on."""
        return int(self._any.generator.info["nimg"])

    @property
    def num_parameters(self) -> int:
        """Of the generator, and of the encoder if there is one."""
        networks = [self._any.generator.model, self._any.encoder]
        return sum(p.numel() for n in networks if n is not None for p in n.parameters())

    def to_json(self, cost: Cost, metrics: Mapping[str, Estimate]) -> dict[str, Any]:
        """As plain values, with what it cost and how good its samples are."""
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
        return next(iter(self.ways.values()))


@dataclass(frozen=True)
class Cost:
    """What training took, from the run's rows."""

    seconds: float
    """Without what lies between attempts."""
    images_per_second: float
    """Over the whole training."""
    peak_memory_gib: float | None
    """Of rank 0: on the GPU, or of its process; None where no row tells."""


@dataclass(frozen=True)
class Restored:
    """How one way of one run, or the trivial one, brought images back."""

    name: str
    figures: Mapping[str, Estimate]
    seconds_per_image: float | None
    images: Tensor
    """uint8 (n, C, H, W)."""

    def to_json(self) -> dict[str, Any]:
        """As plain values, without the images."""
        return {
            "name": self.name,
            "figures": {name: asdict(value) for name, value in self.figures.items()},
            "seconds_per_image": self.seconds_per_image,
        }


def enter(text: str, search: Search, *, device: str = "cpu") -> Entry:
    """A run's folder, of which the newest snapshot is taken, or a snapshot in one, named RUN@KIMG.

    Raises `ConfigError` if it is no part of a run, `CheckpointError` if it has no snapshot.
    """
    snapshot = snapshot_file(Path(text).expanduser().absolute())
    run_dir = containing_run(snapshot)
    if run_dir is None:
        raise ConfigError(f"{text} is not part of a run: expected its folder, or a snapshot in it")
    by_default = Reconstructor.load(snapshot, search=search, device=device)
    names: tuple[By, ...] = ("encoder", "inversion") if by_default.encoder else ("inversion",)
    ways = {by: Reconstructor(by_default.generator, by_default.encoder, by, search) for by in names}
    method = load_config(run_dir.config).method.name
    kimg = by_default.generator.info["nimg"] / 1000
    name = run_dir.name if Path(text).expanduser().is_dir() else f"{run_dir.name}@{kimg:g}"
    return Entry(name, snapshot, run_dir, method, ways)


def cost_of(entry: Entry) -> Cost:
    """What it took to train the run as far as its snapshot."""
    history = History.read(entry.run_dir)
    rows = [row for row in history.rows if row["nimg"] <= entry.nimg]
    speeds = [(row["nimg"], row.get("time/images_per_second")) for row in rows]
    seconds, before = 0.0, 0
    for nimg, speed in speeds:
        if speed:
            seconds += (nimg - before) / speed
            before = nimg
    peaks = [max((row[name] for row in rows if name in row), default=None) for name in _MEMORY]
    peak = next((peak for peak in peaks if peak is not None), None)
    return Cost(seconds, before / seconds if seconds else 0.0, peak)


def quality(
    entry: Entry,
    reference: ImageSet,
    judges: Judges,
    *,
    metric: MetricName,
    num_images: int,
    planned: Callable[[Workload], None],
    start_task: StartTask,
) -> Mapping[str, Estimate]:
    """What a metric says of `num_images` samples, for seeds from 0, beside the reference."""
    samples = GeneratedImages.of_snapshot(entry.snapshot, num_images, device=judges.world.device)
    evaluation = evaluate(
        samples,
        reference,
        judges.extractor,
        judges.world,
        metrics=[metric],
        required=True,
        cache=FeatureCache(),
        resume_samples=True,
        planned=planned,
        start_task=start_task,
        device=judges.world.device,
    )
    assert evaluation is not None
    return evaluation.metrics


def restored(
    entries: Sequence[Entry],
    images: ImageSet,
    degradation: Degradation,
    judges: Judges,
    *,
    seed: int,
    start_task: StartTask,
) -> tuple[Tensor, list[Restored]]:
    """The truth, uint8 (n, C, H, W), and what each way of each run makes of it, the trivial first.

    Runs in one process, so that the times mean what they say.
    """
    results: list[Restored] = []
    truth = torch.empty(0)
    for entry in entries:
        for by, way in entry.ways.items():
            name = f"{entry.name}, {by}"
            progress = start_task(f"{degradation.name}: {name}", way.num_steps(len(images)))
            began = time.perf_counter()
            made = reconstruct(way, images, degradation, judges.world, seed=seed, progress=progress)
            seconds = (time.perf_counter() - began) / len(images)
            assert made is not None
            truth = made.truth
            if not results:
                results.append(_judged("trivial", made.trivial, truth, judges, None))
            results.append(_judged(name, made.images, truth, judges, seconds))
    return truth, results


def _judged(
    name: str, images: Tensor, truth: Tensor, judges: Judges, seconds: float | None
) -> Restored:
    each = similarity(images, truth, judges.extractor, judges.network)
    figures = {metric: of_repeats(values.tolist()) for metric, values in each.items()}
    return Restored(name, figures, seconds, images)
