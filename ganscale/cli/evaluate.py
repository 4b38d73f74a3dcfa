"""The command that measures how good images are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ganscale.cli.app import app, write_json
from ganscale.cli.options import (
    AutoDevice,
    Extractor,
    JsonFile,
    NumReference,
    Reference,
    Split,
    parse_names,
)
from ganscale.errors import ConfigError
from ganscale.json_lines import read_lines
from ganscale.run_directory import RunDirectory
from ganscale.world import World

if TYPE_CHECKING:
    from ganscale.evaluation.distributions.evaluation import Evaluation
    from ganscale.evaluation.image_sets import ImageSet


# A list here, since reading the modules would load torch for `ganscale --help`.
_METRICS = (
    "fid, fid_infinity, kid, inception_score, prdc (precision, recall, density, coverage), "
    "authenticity, c2st_1nn, fid_per_class, c2st, cas"
)


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
    reference: Reference = None,
    split: Annotated[
        Split | None,
        typer.Option(
            help="Which part of --reference, and of --images, if it has both; default: train.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help=f"Some of {_METRICS}; default: all but the last three.")
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(min=1, help="Generated images; default: 10000.", show_default=False),
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="For cas: real images that nothing was trained on.")
    ] = None,
    num_reference: NumReference = None,
    reference_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Reference images, at random, that kid, prdc, authenticity and c2st_1nn use; "
            "default: as many as there are samples.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Seed of the first generated image; each next one is 1 higher; default: 0.",
            show_default=False,
        ),
    ] = None,
    extractor: Extractor = "auto",
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
    from ganscale.evaluation.evaluate import check_split, choose_metrics, measure, open_reference
    from ganscale.evaluation.image_sets import GeneratedImages, open_images
    from ganscale.evaluation.run_references import default_reference
    from ganscale.metrics.extractors import open_extractor

    given = [value for value in (run, snapshot, images) if value is not None]
    if len(given) != 1:
        raise ConfigError("expected one of --run, --snapshot and --images")
    subject = str(given[0])
    chosen = choose_metrics(None if metrics is None else parse_names(metrics))
    # Now, and not when the metrics are added to the run's files, after what may be hours.
    if run is not None and not RunDirectory(run.expanduser()).config.is_file():
        raise ConfigError(
            f"--run {run}: expected the folder of a run, with its config.yaml; for a snapshot, use "
            "--snapshot"
        )
    if test is not None and "cas" not in chosen:
        raise ConfigError("--test is for cas: add it to --metrics, or leave --test")
    if images is not None and (num is not None or seed is not None):
        raise ConfigError(
            "--num and --seed are for generated images: leave them, since --images are all compared"
        )
    world = World.detect(device)
    network = open_extractor(extractor, weights=weights, weights_sha256=weights_sha256)
    network.to(world.device)
    real = open_reference(reference or default_reference(subject), split or "train", num_reference)
    samples: ImageSet
    if images is not None:
        samples = open_images(images, split=split or "train")
    else:
        num_images = 10_000 if num is None else num
        samples = GeneratedImages.of_snapshot(
            Path(subject), num_images, seed=seed or 0, device=world.device
        )
    check_split(split, samples, real)
    real_test = None if test is None else open_images(test, split="test")
    evaluation = measure(
        samples,
        real,
        network,
        world,
        metrics=chosen,
        # Metrics that were asked for must be possible; of the default ones those that cannot be
        # computed are listed with the reasons.
        required=metrics is not None,
        num_reference_rows=reference_rows,
        real_test=real_test,
        show_progress=True,
    )
    # Ranks other than 0 have done their share.
    if evaluation is None:
        return
    typer.echo(str(evaluation))
    # Each whether or not the other can be written: an hour's result must not be lost.
    try:
        write_json(json_file, evaluation.to_json())
    finally:
        if run is not None:
            _log_evaluation(run, samples, evaluation)
    # Only now that those which could be computed have been shown and written.
    if metrics is not None:
        evaluation.check_complete()


def _log_evaluation(run: Path, samples: ImageSet, evaluation: Evaluation) -> None:
    """Append the metrics to the run's rows of metrics, and the protocol to its events."""
    from ganscale.evaluation.image_sets import GeneratedImages
    from ganscale.tracking.sinks import EventLog, JsonlSink

    assert isinstance(samples, GeneratedImages)
    run_dir = RunDirectory(run.expanduser().absolute())
    nimg = int(samples.generator.info["nimg"])
    rows = read_lines(run_dir.metrics)
    # The row must belong to the attempt that the run is in, or `History` would take it for one that
    # a rollback undid.
    attempt = int(rows[-1]["attempt"]) if rows else 0
    sink, events = JsonlSink(run_dir.metrics), EventLog(run_dir.events)
    sink.log({"nimg": nimg, **evaluation.row(), "attempt": attempt, "time/unix": time.time()})
    events.write("evaluation", attempt=attempt, nimg=nimg, **evaluation.to_json())
    sink.close()
    events.close()
