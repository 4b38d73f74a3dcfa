"""The command that measures how good images are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ganscale.cli.app import app, scratch_folder, stderr_console, write_json
from ganscale.cli.options import AutoDevice, JsonFile, Split, parse_names
from ganscale.config import RENAMED_METRICS, ExtractorName
from ganscale.errors import ConfigError

if TYPE_CHECKING:
    from ganscale.config import MetricName
    from ganscale.evaluation.distributions.evaluate import Evaluation, Protocol, StartTask
    from ganscale.evaluation.image_sets import ImageSet
    from ganscale.metrics.extractors import FeatureExtractor
    from ganscale.world import World

__all__ = ["print_table"]

# A list here, since reading the modules would load torch for `ganscale --help`.
_METRICS = (
    "fid, fid_infinity, kid, inception_score, prdc (precision, recall, density, coverage), "
    "authenticity, fid_per_class, c2st_1nn, c2st, cas"
)

# Published figures are of 10,000 or 50,000 samples; the bias of fewer is what one would see.
_FEW_SAMPLES = 10_000

# FID of 50,000 samples against the training set by the same network, by StudioGAN's benchmark of
# published models; that of the test images is by this code and agrees with the published 3.15.
_KNOWN_FID = {
    "CIFAR-10's training images": (
        "its test images 3.15, StyleGAN2-ADA 2.31, SNGAN 9.01, DCGAN 48.29"
    )
}


@app.command(
    epilog="Example: ganscale evaluate --run runs/quickstart --num 10000    "
    "Two folders: ganscale evaluate --images a --reference b"
)
def evaluate(
    run: Annotated[
        Path | None,
        typer.Option(help="A run: its newest snapshot; the metrics are added to its files."),
    ] = None,
    snapshot: Annotated[Path | None, typer.Option(help="A snapshot (.safetensors).")] = None,
    images: Annotated[
        str | None, typer.Option(help="Images in files instead: a folder, archive or shard set.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Shard set, folder, cifar10; default: what the run trains on."),
    ] = None,
    split: Annotated[
        Split, typer.Option(help="Which part of a reference that has both.")
    ] = "train",
    metrics: Annotated[
        str | None, typer.Option(help=f"Some of {_METRICS}; default: all but the last two.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Generated images.")] = 10_000,
    test: Annotated[
        str | None, typer.Option(help="For cas: real images that nothing was trained on.")
    ] = None,
    num_reference: Annotated[
        int | None, typer.Option(min=1, help="Use only so many reference images, drawn at random.")
    ] = None,
    reference_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Reference images, at random, that all metrics but fid and fid_infinity use; "
            "default: as many as there are samples.",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of the first generated image; each next one is 1 higher."),
    ] = 0,
    extractor: Annotated[
        ExtractorName,
        typer.Option(help="Network of the features; auto: Inception if its weights are installed."),
    ] = "auto",
    weights: Annotated[
        Path | None, typer.Option(help="The extractor's weights; also GANSCALE_INCEPTION.")
    ] = None,
    weights_sha256: Annotated[
        str | None, typer.Option(help="sha256 of weights that are not the published ones.")
    ] = None,
    device: AutoDevice = "auto",
    json_file: JsonFile = None,
) -> None:
    """Compare generated images with real ones: FID, KID, precision, recall, copies."""
    from ganscale.evaluation.gan_metrics.classifier_metrics import with_classifier_metrics
    from ganscale.evaluation.image_sets import open_images
    from ganscale.evaluation.run_log import log_evaluation
    from ganscale.evaluation.run_references import default_reference
    from ganscale.metrics.extractors import open_extractor
    from ganscale.tracking.console import progress_bars
    from ganscale.world import World, process_group

    subject = _one_of(run, snapshot, images)
    chosen, classifier_metrics = _chosen_metrics(metrics)
    world = World.detect(device)
    network = open_extractor(extractor, weights=weights, weights_sha256=weights_sha256)
    network.to(world.device)
    real = _opened_reference(reference or default_reference(subject), split, num_reference)
    samples = _opened_samples(subject, images, split, num=num, seed=seed, device=world.device)
    console = stderr_console() if world.is_main else None
    with process_group(world), progress_bars(console) as start_task:
        evaluation = _compare(
            samples,
            real,
            network,
            world,
            metrics=chosen,
            num_reference_rows=reference_rows,
            # Metrics that were asked for must succeed; of the default ones those that cannot be
            # computed are listed with the reasons.
            required=metrics is not None,
            start_task=start_task,
        )
        # Ranks other than 0 have done their share.
        if evaluation is None:
            return
        real_test = (
            None if test is None else open_images(test, split="test", scratch=scratch_folder())
        )
        evaluation = with_classifier_metrics(
            evaluation,
            classifier_metrics,
            samples,
            real,
            real_test,
            device=world.device,
            start_task=start_task,
        )
    print_table(evaluation)
    # The run first: a --json path that cannot be written must not lose an hour's result.
    if run is not None:
        log_evaluation(run, samples, evaluation)
    write_json(json_file, evaluation.to_json())


def _opened_reference(place: str, split: Split, num_images: int | None) -> ImageSet:
    from ganscale.evaluation.image_sets import open_images
    from ganscale.evaluation.image_views import Subset

    whole = open_images(place, split=split, scratch=scratch_folder())
    # Not drawn by --seed: evaluations of other seeds are to have the same reference.
    return whole if num_images is None else Subset.random(whole, num_images, seed=0)


def _opened_samples(
    subject: str, images: str | None, split: Split, *, num: int, seed: int, device: str
) -> ImageSet:
    """The images in files if they are named, else those of the generator."""
    from ganscale.evaluation.image_sets import GeneratedImages, open_images

    if images is not None:
        return open_images(images, split=split, scratch=scratch_folder())
    return GeneratedImages.of_snapshot(Path(subject), num, seed=seed, device=device)


def _compare(
    samples: ImageSet,
    reference: ImageSet,
    network: FeatureExtractor,
    world: World,
    *,
    metrics: list[MetricName],
    num_reference_rows: int | None,
    required: bool,
    start_task: StartTask,
) -> Evaluation | None:
    """The metrics of features, on rank 0; a line says before how long they will take."""
    from ganscale.cli.duration import announce
    from ganscale.evaluation.distributions.evaluate import evaluate
    from ganscale.evaluation.distributions.features import FeatureCache

    return evaluate(
        samples,
        reference,
        network,
        world,
        metrics=metrics,
        num_reference_rows=num_reference_rows,
        required=required,
        cache=FeatureCache(),
        resume_samples=True,
        planned=partial(announce, network=network, shape=samples.shape, world=world),
        start_task=start_task,
        device=world.device,
    )


def _one_of(run: Path | None, snapshot: Path | None, images: str | None) -> str:
    given = [value for value in (run, snapshot, images) if value is not None]
    if len(given) != 1:
        raise ConfigError("expected one of --run, --snapshot and --images")
    return str(given[0])


def _chosen_metrics(text: str | None) -> tuple[list[MetricName], list[str]]:
    """The metrics of features and those of classifiers; without a choice all of the former."""
    from ganscale.evaluation.distributions.evaluate import METRICS
    from ganscale.evaluation.gan_metrics.classifier_metrics import CLASSIFIER_METRICS

    if text is None:
        return list(METRICS), []
    known = (*METRICS, *CLASSIFIER_METRICS)
    names = parse_names(text)
    for name in names:
        if name in RENAMED_METRICS:
            raise ConfigError(
                f"--metrics {name}: this metric is now called {RENAMED_METRICS[name]}"
            )
    if not names or set(names) - set(known):
        raise ConfigError(f"--metrics {text}: expected some of {', '.join(known)}")
    of_features = [name for name in names if name not in CLASSIFIER_METRICS]
    of_classifiers = [name for name in names if name in CLASSIFIER_METRICS]
    return cast("list[MetricName]", of_features), of_classifiers


def print_table(evaluation: Evaluation) -> None:
    """The protocol, then a row for each metric."""
    protocol = evaluation.protocol
    typer.echo(f"samples    {protocol.samples}")
    typer.echo(f"reference  {protocol.reference}")
    if protocol.num_reference_rows:
        drawn = f"{protocol.num_reference_rows:,} of them, at random,"
        typer.echo(f"           {drawn} for all metrics but fid and fid_infinity")
    if protocol.reference_statistics != "extracted":
        typer.echo(f"           included mean and covariance of {protocol.reference_statistics}")
    typer.echo(f"features   {protocol.extractor}, {protocol.resizer}")
    width = max(len("metric"), *map(len, (*evaluation.metrics, *evaluation.skipped)))
    typer.echo(f"\n{'metric':{width}} {'value':>9}  {'95 % interval':20}  better")
    for name, value in evaluation.metrics.items():
        bounds = "" if value.low is None else f"{value.low:.4g} to {value.high:.4g}"
        better = _better(name, protocol)
        typer.echo(f"{name:{width}} {value.value:9.4g}  {bounds:20}  {better}".rstrip())
    for name, reason in evaluation.skipped.items():
        typer.echo(f"{name:{width}} {'-':>9}  {reason}")
    typer.echo(f"\n{sum(evaluation.seconds.values()):.0f} s")


def _better(column: str, protocol: Protocol) -> str:
    """Which direction is better, and what is known of the scale."""
    is_biased = column.startswith(("fid", "fd_")) and "infinity" not in column
    if is_biased and protocol.num_samples < _FEW_SAMPLES:
        return f"lower; too high by its bias: fewer than {_FEW_SAMPLES:,} samples"
    if column == "fid" and protocol.reference_statistics in _KNOWN_FID:
        return f"lower: {_KNOWN_FID[protocol.reference_statistics]}"
    if column.startswith(("fid", "fd_", "kid", "kd_")):
        return "lower"
    if column.startswith("c2st"):
        return "lower: 0.5 is indistinguishable"
    return "higher"
