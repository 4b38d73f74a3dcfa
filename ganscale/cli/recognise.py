"""Commands that measure how much a GAN improves a classifier."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ganscale.cli.app import app, stderr_console, write_json
from ganscale.cli.options import Device, JsonFile, parse_integers
from ganscale.config import Config, SemiSupervisedMethod, load_config
from ganscale.config.changes import MAY_CHANGE_ON_RESUME, settings_by_name
from ganscale.errors import ConfigError
from ganscale.run_directory import RunDirectory

if TYPE_CHECKING:
    from ganscale.evaluation.recognition.probe import FeatureFn
    from ganscale.metrics.intervals import Estimate


recognise = typer.Typer(help="Measure how much a GAN improves a classifier.", no_args_is_help=True)
app.add_typer(recognise, name="recognise")

_Train = Annotated[
    str | None, typer.Option(help="Labelled images; default: what the run trains on.")
]
_Test = Annotated[str, typer.Option(help="Labelled images that nothing was trained on.")]
_Seeds = Annotated[
    int, typer.Option(min=1, help="Number of seeds; the confidence intervals are over them.")
]


@recognise.command(
    epilog="Example: ganscale recognise probe runs/dcgan-cifar10 --test data/cifar10-test"
)
def probe(
    run: Annotated[str, typer.Argument(help="Folder of a run, or RUN@KIMG.")],
    test: _Test,
    train: _Train = None,
    num: Annotated[int, typer.Option(min=10, help="Labelled images to train on.")] = 10_000,
    seeds: _Seeds = 3,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Train linear classifiers on a discriminator's features, an untrained one's, and pixels."""
    import torch

    from ganscale.evaluation.gan_metrics.gan_pairs import load_gan_pairs
    from ganscale.evaluation.image_sets import open_images
    from ganscale.evaluation.recognition.probe import pooled_activations, scaled_pixels
    from ganscale.evaluation.recognition.probe import probe as measure
    from ganscale.evaluation.run_references import default_reference
    from ganscale.models import build_discriminator
    from ganscale.tracking.console import progress_bars

    (pair,) = load_gan_pairs([run], device=device)
    spec = pair.spec
    of_train, of_test = (
        open_images(train or default_reference(run, "--train")),
        open_images(test, split="test"),
    )
    trained = pooled_activations(pair.discriminator.model, num_classes=spec["num_classes"])

    # Another initialisation for each seed, so that its interval covers them; the caller's generator
    # stays as it is.
    def untrained(seed: int) -> FeatureFn:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_discriminator(spec).to(device).eval()
        return pooled_activations(network, num_classes=spec["num_classes"])

    kinds = {
        f"discriminator of {pair.name}": lambda _: trained,
        "the same, untrained": untrained,
        "pixels": lambda _: scaled_pixels,
    }
    # The same images and seeds for all kinds of features, so their differences are those of
    # features.
    with progress_bars(stderr_console()) as start_task:
        results = [
            measure(
                name,
                features_for_seed,
                of_train,
                of_test,
                num_train=num,
                seeds=range(seeds),
                device=device,
                start_task=start_task,
            )
            for name, features_for_seed in kinds.items()
        ]
    typer.echo(f"train  {min(num, len(of_train))} of {of_train.description}, {seeds} seeds")
    typer.echo(f"test   {of_test.description}\n")
    typer.echo(f"{'features':44} {'number':>7}  accuracy")
    for result in results:
        typer.echo(f"{result.features:44} {result.num_features:7d}  {_per_cent(result.accuracy)}")
    write_json(json_file, {"results": [result.to_json() for result in results]})


@recognise.command(
    epilog="Example: ganscale recognise augment runs/biggan-cifar10 --test data/cifar10-test "
    "--real 500,5000"
)
def augment(
    run: Annotated[Path, typer.Argument(help="Snapshot or run of a generator with classes.")],
    test: _Test,
    train: _Train = None,
    real: Annotated[str, typer.Option(help="Numbers of real images to train on.")] = "500,5000",
    generated: Annotated[int, typer.Option(min=1, help="Images to add.")] = 10_000,
    passes: Annotated[
        int, typer.Option(min=1, help="Images passed through the network in each training.")
    ] = 250_000,
    seeds: _Seeds = 3,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Train a classifier on few real images, with and without generated ones."""

    import torch

    from ganscale.evaluation.image_sets import GeneratedImages, open_images
    from ganscale.evaluation.recognition.accuracy_score import SHORT_SCORE
    from ganscale.evaluation.recognition.sample_augmentation import augment_with_samples
    from ganscale.evaluation.run_references import default_reference
    from ganscale.tracking.console import counting

    numbers = parse_integers("--real", real)
    samples = GeneratedImages.of_snapshot(run, generated, device=device)
    # Before classifiers are trained, with the presets that have classes.
    if samples.labels is None:
        raise ConfigError(
            f"{run} makes images without labels: train with model.num_classes > 0 "
            "(biggan-cifar10, r3gan-cifar10)"
        )
    of_train = open_images(train or default_reference(str(run), "--train"))
    of_test = open_images(test, split="test")
    recipe = replace(SHORT_SCORE, num_passes=passes)
    # With generated images and without, for each number of real images.
    total = 2 * passes * seeds * len(numbers)
    with counting("training classifiers", total, stderr_console()) as progress:
        results = [
            augment_with_samples(
                of_train,
                samples,
                of_test,
                number,
                recipe=recipe,
                seeds=range(seeds),
                device=torch.device(device),
                progress=progress,
            )
            for number in numbers
        ]
    typer.echo(f"{samples.description}; {passes} images passed in each training, {seeds} seeds")
    typer.echo(f"test   {of_test.description}\n")
    typer.echo(f"{'real images':>11}  {'real alone':26} {'with generated':26} gain")
    for row in results:
        columns = f"{_per_cent(row.real):26} {_per_cent(row.both):26} {_per_cent(row.gain)}"
        typer.echo(f"{row.num_real:11d}  {columns}")
    write_json(json_file, {"results": [row.to_json() for row in results]})


@recognise.command(
    "semi-supervised",
    epilog="Example: ganscale train --config semi-supervised-cifar10 name=adversarial-0;  "
    "ganscale train --config semi-supervised-cifar10 name=alone-0 method.adversarial=0;  "
    "ganscale recognise semi-supervised runs/adversarial-0 runs/alone-0 --test data/cifar10-test",
)
def semi_supervised(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, of any seeds.")],
    test: _Test,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Test the classifiers of semi-supervised runs, with and without adversarial training.

    Runs that differ by their seed only are repeats of each other.
    """
    from ganscale.evaluation.image_sets import open_images
    from ganscale.evaluation.recognition.semi_supervised import classifier_of_run, snapshot_accuracy
    from ganscale.generation.snapshot import snapshot_classes
    from ganscale.metrics.intervals import t_interval
    from ganscale.tracking.console import counting

    of_test = open_images(test, split="test")
    accuracies = []
    with counting("testing classifiers", len(runs), stderr_console()) as progress:
        for run in runs:
            classifier = classifier_of_run(run, device=device)
            classes = snapshot_classes(run)
            accuracies.append(snapshot_accuracy(classifier, classes, of_test, device=device))
            progress(1)
    by_kind: dict[str, dict[str, float]] = defaultdict(dict)
    for run, kind, accuracy in zip(runs, _kinds_of(runs), accuracies, strict=True):
        by_kind[kind][str(run)] = accuracy
    typer.echo(f"test   {of_test.description}\n")
    typer.echo(f"{'runs':52} {'seeds':>5}  accuracy")
    rows = {kind: t_interval([*of_runs.values()]) for kind, of_runs in by_kind.items()}
    for kind, estimate in rows.items():
        typer.echo(f"{kind:52} {len(by_kind[kind]):5d}  {_per_cent(estimate)}")
    write_json(json_file, {"runs": by_kind, "accuracy": {k: vars(e) for k, e in rows.items()}})


def _kinds_of(runs: Sequence[Path]) -> list[str]:
    """What each run is, the same for runs that differ by their seed only.

    Where the usual words do not tell two runs apart, the settings in which they differ follow them.
    """
    configs = [load_config(RunDirectory(run).config) for run in runs]
    texts = [_described(config) for config in configs]
    recipes = [settings_by_name(config) for config in configs]
    kinds = []
    for text, recipe in zip(texts, recipes, strict=True):
        alike = [other for kind, other in zip(texts, recipes, strict=True) if kind == text]
        differing = [
            f"{name}={value}"
            for name, value in recipe.items()
            # What may change on a resume does not decide what is learnt, but for the length, which
            # the words have.
            if name != "seed" and not name.startswith(MAY_CHANGE_ON_RESUME)
            if any(other.get(name) != value for other in alike)
        ]
        kinds.append(", ".join([text, *differing]))
    return kinds


def _described(config: Config) -> str:
    assert isinstance(config.method, SemiSupervisedMethod)
    length = f"{config.training.total_kimg:g} kimg"
    if not config.method.adversarial:
        return f"{config.method.labels} labels alone, {length}"
    weight = config.method.adversarial
    beside = "adversarial training" if weight == 1 else f"{weight:g} times adversarial training"
    return f"{config.method.labels} labels and {beside}, {length}"


def _per_cent(estimate: Estimate) -> str:
    text = f"{100 * estimate.value:.2f} %"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({100 * estimate.low:.2f} to {100 * estimate.high:.2f})"
