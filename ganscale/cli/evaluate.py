"""The verb that measures how good images are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from ganscale.cli.app import JsonFile, app, stderr_console, write_json
from ganscale.errors import ConfigError

if TYPE_CHECKING:
    from ganscale.config import MetricName
    from ganscale.evaluation.distribution import Evaluation
    from ganscale.evaluation.images import ImageSet

__all__: list[str] = []

# Lists here, since reading the modules would load torch for `ganscale --help`.
_EXTRACTORS = Literal["auto", "inception-v3", "efficientnet-lite0", "dinov2", "clip"]
_METRICS = (
    "frechet, frechet_infinity, kernel, inception_score, neighbourhood, authenticity, "
    "frechet_per_class, c2st_1nn, c2st, cas"
)


@app.command(
    epilog="Example: ganscale evaluate --run runs/quickstart --num 10000    "
    "Two folders: ganscale evaluate --images a --reference b"
)
def evaluate(
    run: Annotated[
        Path | None, typer.Option(help="A run: its newest snapshot; the figures join its rows.")
    ] = None,
    snapshot: Annotated[Path | None, typer.Option(help="A snapshot (.safetensors).")] = None,
    images: Annotated[
        str | None, typer.Option(help="Images instead: a folder, archive or shard set.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Shard set, folder, cifar10; default: what the run trains on."),
    ] = None,
    split: Annotated[
        Literal["train", "test"], typer.Option(help="Of a reference that has both.")
    ] = "train",
    metrics: Annotated[
        str | None, typer.Option(help=f"Some of {_METRICS}; default: all but the last two.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Generated images.")] = 10_000,
    test: Annotated[
        str | None, typer.Option(help="For cas: real images that nothing was trained on.")
    ] = None,
    num_reference: Annotated[
        int | None, typer.Option(min=1, help="Only so many of the reference, at random.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first generated image; then +1.")] = 0,
    extractor: Annotated[
        _EXTRACTORS, typer.Option(help="auto: Inception if its weights are there.")
    ] = "auto",
    weights: Annotated[
        Path | None, typer.Option(help="The extractor's weights; also GANSCALE_INCEPTION.")
    ] = None,
    weights_sha256: Annotated[
        str | None, typer.Option(help="Of weights that are not the published ones.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Compare generated images with real ones: distances, precision, recall, copies."""

    from ganscale.evaluation.distribution import METRICS
    from ganscale.evaluation.distribution import evaluate as compare
    from ganscale.evaluation.features import FeatureCache
    from ganscale.evaluation.images import GeneratedImages, Subset, open_images
    from ganscale.evaluation.judgements import JUDGEMENTS, judged
    from ganscale.evaluation.runs import default_reference, note_in_run
    from ganscale.metrics.extractors import open_extractor
    from ganscale.tracking.console import parts
    from ganscale.world import World, process_group

    subject = _one_of(run, snapshot, images)
    named = list(METRICS) if metrics is None else _metrics(metrics, (*METRICS, *JUDGEMENTS))
    judgements = [name for name in named if name in JUDGEMENTS]
    chosen = cast("list[MetricName]", [name for name in named if name not in JUDGEMENTS])
    world = World.detect(device)
    network = open_extractor(extractor, weights=weights, weights_sha256=weights_sha256)
    network.to(world.device)
    scratch = FeatureCache().folder.parent
    known = reference or default_reference(subject)
    of_reference: ImageSet = open_images(known, split=split, scratch=scratch)
    if num_reference is not None:
        of_reference = Subset.random(of_reference, num_reference, seed=0)
    samples: ImageSet
    if images is not None:
        samples = open_images(images, split=split, scratch=scratch)
    else:
        samples = GeneratedImages.of_snapshot(Path(subject), num, seed=seed, device=world.device)
    console = stderr_console()
    with process_group(world), parts(console if world.is_main else None) as started:
        found = compare(
            samples,
            of_reference,
            network,
            world,
            metrics=chosen,
            required=metrics is not None,
            cache=FeatureCache(),
            started=started,
            device=world.device,
        )
        if found is None:
            return
        of_test = None if test is None else open_images(test, split="test", scratch=scratch)
        found = judged(
            found, judgements, samples, of_reference, of_test, device=world.device, started=started
        )
    _print(found)
    if run is not None:
        note_in_run(run, samples, found)
    write_json(json_file, found.to_json())


def _one_of(run: Path | None, snapshot: Path | None, images: str | None) -> str:
    given = [value for value in (run, snapshot, images) if value is not None]
    if len(given) != 1:
        raise ConfigError("expected one of --run, --snapshot and --images")
    return str(given[0])


def _metrics(text: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(f"--metrics {text}: expected some of {', '.join(known)}")
    return names


def _print(found: Evaluation) -> None:
    protocol = found.protocol
    typer.echo(f"samples    {protocol.samples}")
    typer.echo(f"reference  {protocol.reference}")
    typer.echo(f"features   {protocol.extractor}, {protocol.resizer}")
    typer.echo(f"\n{'metric':38} {'value':>10}   95 % interval")
    for name, value in found.metrics.items():
        bounds = "" if value.low is None else f"{value.low:.4g} to {value.high:.4g}"
        typer.echo(f"{name:38} {value.value:10.4g}   {bounds}")
    for name, reason in found.skipped.items():
        typer.echo(f"{name:38} {'-':>10}   {reason}")
    typer.echo(f"\n{sum(found.seconds.values()):.0f} s")
