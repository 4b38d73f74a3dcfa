"""Images against a reference, by metrics that are named: `ganscale.evaluate`, and the command's.

`evaluate` opens what a program names, in one process. `measure`, on which the command is built too,
computes all metrics of two sets that are open, by all ranks of a world.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from ganscale.config import RENAMED_METRICS, ExtractorName, MetricName
from ganscale.data.layout import Split
from ganscale.errors import CheckpointError, ConfigError
from ganscale.evaluation.distributions.evaluate import METRICS, ROW_METRICS
from ganscale.evaluation.distributions.evaluate import evaluate as evaluate_features
from ganscale.evaluation.distributions.evaluation import Evaluation
from ganscale.evaluation.distributions.features import MAX_ROWS, FeatureCache
from ganscale.evaluation.gan_metrics.classifier_metrics import (
    CLASSIFIER_METRICS,
    check_classifier_metrics,
    with_classifier_metrics,
)
from ganscale.evaluation.image_sets import (
    FileImages,
    GeneratedImages,
    ImageSet,
    ImagesOfShards,
    open_images,
)
from ganscale.evaluation.image_views import Subset
from ganscale.evaluation.memory_images import HeldImages, MemoryImages
from ganscale.evaluation.run_references import default_reference
from ganscale.generation.generator import Generator
from ganscale.generation.sampler import SampleableGenerator
from ganscale.generation.snapshot import snapshot_file, weights_digest
from ganscale.metrics.extractors import FeatureExtractor, open_extractor
from ganscale.tracking.console import progress_bars, stderr_console
from ganscale.world import World, process_group

DEFAULT_METRICS = tuple(metric for metric in METRICS if metric != "fid_per_class")
"""What is computed without a choice: what takes seconds once features have been extracted, and no
more features of the reference than the others need."""


def evaluate(
    images: SampleableGenerator | HeldImages | str | Path,
    reference: HeldImages | str | Path | None = None,
    *,
    metrics: Sequence[str] | None = None,
    num: int = 10_000,
    seed: int = 0,
    split: Split | None = None,
    num_reference: int | None = None,
    reference_rows: int | None = None,
    test: str | Path | None = None,
    extractor: ExtractorName | FeatureExtractor = "auto",
    device: str = "auto",
    progress: bool = False,
) -> Evaluation:
    """Compare images with real ones, as `ganscale evaluate` does, in this process.

    Args:
        images: a `Generator`, of which `num` images are drawn; a snapshot or the folder of a run,
            of whose newest one they are drawn; a folder, archive or shard set of images; or images
            in memory: a tensor (N, C, H, W) of uint8 or of floats in [0, 1], an array (N, H, W, C)
            of uint8, or a list of Pillow images.
        reference: the real images: a shard set, a folder, `cifar10`, or images in memory. By
            default, for a generator in a run's folder, what the run trains on.
        metrics: some of `fid`, `fid_infinity`, `kid`, `inception_score`, `prdc` (precision, recall,
            density, coverage), `authenticity`, `c2st_1nn`, `fid_per_class`, `c2st` and `cas`. By
            default all but the last three, of which the first extracts features of the whole
            reference and the others train classifiers; those that cannot be computed are then in
            `skipped` with the reasons.
        num: images that are drawn of a generator; images that are given are all used. Of more than
            50,000 so many are drawn at random, and the protocol says so.
        seed: of the first image that is drawn; each next one is 1 higher.
        split: which part of an image set that has both, by default "train".
        num_reference: use only so many images of the reference, drawn at random.
        reference_rows: reference images, drawn at random, that `kid`, `prdc`, `authenticity` and
            `c2st_1nn` use; by default as many as there are samples.
        test: for `cas`, real images that nothing was trained on.
        extractor: the network of the features; `auto` is Inception if its weights are installed
            (`ganscale[fid]`), else one that is, under other names of metrics (`fd_...`).
        device: `auto`, `cpu` or `cuda`.
        progress: whether progress is shown on standard error.

    Returns:
        The values with 95 % intervals in `metrics`, by name, and how they were measured in
        `protocol`. No file of a run is changed; features of the reference are cached.

    Example:
        >>> import ganscale
        >>>
        >>> generator = ganscale.Generator.from_pretrained("runs/quickstart")
        >>> evaluation = ganscale.evaluate(generator, "cifar10", metrics=["fid", "kid"], num=2000)
        >>> print(evaluation.metrics["kid"].value)

    Raises:
        ConfigError: an unknown metric, no reference, `reference_rows` or `split` where they have
            no effect, or several processes: for these there is `torchrun -m ganscale evaluate`.
        DataError: images are too few, unreadable, of different shapes or all equal; or a metric
            that was named cannot be computed. If the others have been, a note of the error has
            their table.
    """
    world = World.detect(device)
    if world.world_size > 1:
        raise ConfigError(
            "ganscale.evaluate works in one process; several share the work of "
            "torchrun -m ganscale evaluate"
        )
    names = choose_metrics(metrics)
    part = split or "train"
    real = _open_real(images, reference, part, num_reference)
    samples = _open_samples(images, part, num=num, seed=seed, device=world.device)
    check_split(split, samples, real)
    real_test = None if test is None else open_images(str(test), split="test")
    network = open_extractor(extractor) if isinstance(extractor, str) else extractor
    network.to(world.device)
    evaluation = measure(
        samples,
        real,
        network,
        world,
        metrics=names,
        required=metrics is not None,
        num_reference_rows=reference_rows,
        real_test=real_test,
        show_progress=progress,
    )
    assert evaluation is not None, "the only process is rank 0"
    if metrics is not None:
        evaluation.check_complete()
    return evaluation


def choose_metrics(names: Sequence[str] | None) -> Sequence[str]:
    """The metrics that are computed: without a choice those that are quick (`DEFAULT_METRICS`).

    Raises `ConfigError` for a name that is unknown, and one that says the new name of an old one.
    """
    if names is None:
        return DEFAULT_METRICS
    known = (*METRICS, *CLASSIFIER_METRICS)
    for name in names:
        if name in RENAMED_METRICS:
            raise ConfigError(f"metrics {name}: this metric is now called {RENAMED_METRICS[name]}")
    if isinstance(names, str) or not names or set(names) - set(known):
        shown = names if isinstance(names, str) else ",".join(names)
        raise ConfigError(f"metrics {shown}: expected some of {', '.join(known)}")
    return names


def check_split(split: Split | None, samples: ImageSet, reference: ImageSet) -> None:
    """Raise `ConfigError` if a split was asked for and the reference is shards of another one."""
    whole = reference.whole if isinstance(reference, Subset) else reference
    # Shards have the split that they were built of. The one that was asked for may be meant for
    # samples in files.
    if split is None or isinstance(samples, FileImages) or not isinstance(whole, ImagesOfShards):
        return
    if (built := whole.shard_set.split) != split:
        raise ConfigError(
            f"--split {split}: {whole.shard_set.location} is a shard set of the {built} split: "
            "name the place of the other one, or leave --split"
        )


def open_reference(place: str, split: Split, num_images: int | None) -> ImageSet:
    """The images at a place, or so many of them drawn at random."""
    return _part(open_images(place, split=split), num_images)


def measure(
    samples: ImageSet,
    reference: ImageSet,
    network: FeatureExtractor,
    world: World,
    *,
    metrics: Sequence[str],
    required: bool,
    num_reference_rows: int | None,
    real_test: ImageSet | None,
    show_progress: bool,
) -> Evaluation | None:
    """All metrics of samples against a reference; returns them on rank 0, None on other ranks.

    Args:
        samples, reference: of one shape.
        network: of the features, on the world's device.
        world: of the processes that share the work.
        metrics: what `choose_metrics` returns.
        required: whether a metric that is known not to be computable is an error; else it is
            skipped.
        num_reference_rows: how many images of the reference the metrics of single images use.
        real_test: real images of another split, for `cas`.
        show_progress: on standard error, by rank 0.

    A metric that fails although it is required, when others have been computed, is among the
    skipped ones: those who show or keep the others call `Evaluation.check_complete` then.

    Raises `ConfigError` for `cas` without `real_test` or labels, and for `num_reference_rows` that
    no metric uses; what is known to be missing is reported before anything is extracted.
    """
    if num_reference_rows is not None and not ROW_METRICS.intersection(metrics):
        raise ConfigError(
            f"--reference-rows is for {', '.join(sorted(ROW_METRICS))}: add one of these to "
            "--metrics, or leave it"
        )
    check_classifier_metrics(metrics, samples, reference, real_test)
    feature_metrics = cast("list[MetricName]", [m for m in metrics if m in METRICS])
    if feature_metrics:
        # All metrics are of the same images, those that the protocol names.
        samples = Subset.random(samples, MAX_ROWS, seed=0)
    console = stderr_console() if show_progress and world.is_main else None
    with process_group(world), progress_bars(console) as start_task:
        evaluation = evaluate_features(
            samples,
            reference,
            network,
            world,
            metrics=feature_metrics,
            num_reference_rows=num_reference_rows,
            required=required,
            cache=FeatureCache(),
            start_task=start_task,
        )
        # Ranks other than 0 have done their share.
        if evaluation is None:
            return None
        return with_classifier_metrics(
            evaluation,
            metrics,
            samples,
            reference,
            real_test,
            device=world.torch_device,
            start_task=start_task,
        )


def _open_samples(
    images: SampleableGenerator | HeldImages | str | Path,
    split: Split,
    *,
    num: int,
    seed: int,
    device: str,
) -> ImageSet:
    if isinstance(images, SampleableGenerator):
        name = str(getattr(images, "path", None) or images.info["model"]["name"])
        # Of the weights and not of the file: the network may have been changed since it was loaded.
        weights = {key: t.detach().cpu() for key, t in images.model.state_dict().items()}
        return GeneratedImages(images, num, seed, name, weights_digest(weights))
    if not isinstance(images, str | Path):
        return MemoryImages.of(images)
    if (snapshot := _snapshot_at(images)) is not None:
        return GeneratedImages.of_snapshot(snapshot, num, seed=seed, device=device)
    return open_images(str(images), split=split)


def _open_real(
    images: SampleableGenerator | HeldImages | str | Path,
    reference: HeldImages | str | Path | None,
    split: Split,
    num_images: int | None,
) -> ImageSet:
    if reference is None:
        if isinstance(images, Generator) and images.path is not None:
            images = images.path
        if not isinstance(images, str | Path):
            raise ConfigError("these images are not of a run that names its data: give a reference")
        reference = default_reference(str(images))
    if isinstance(reference, str | Path):
        return open_reference(str(reference), split, num_images)
    return _part(MemoryImages.of(reference), num_images)


def _part(whole: ImageSet, num_images: int | None) -> ImageSet:
    # Not drawn by the seed of the samples: evaluations of other seeds are to have the same
    # reference.
    return whole if num_images is None else Subset.random(whole, num_images, seed=0)


def _snapshot_at(place: str | Path) -> Path | None:
    """The snapshot that a place means; None if it holds images."""
    path = Path(place).expanduser()
    if path.is_file() and path.suffix != ".safetensors":
        return None  # an archive
    try:
        return snapshot_file(path)
    except CheckpointError:
        return None
